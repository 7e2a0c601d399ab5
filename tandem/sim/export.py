"""Requests and time series of a simulation as files: CSV, or parquet with the extra `[calibrate]`.

SI units and the names of `tandem.sim.result`; an empty cell (a null in parquet) is what has not happened.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.sim.result import ERROR, LENGTH, TIMES, UNFINISHED, SimResult
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder, write_whole

FINISH = {UNFINISHED: "", LENGTH: "length", ERROR: "error"}
Column = NDArray[np.float64] | NDArray[np.int64] | NDArray[np.int32] | list[str]


def request_columns(result: SimResult) -> dict[str, Column]:
    """One row a request in order of arrival: its number, lengths, times, and what clients felt."""
    table = result.requests
    columns: dict[str, Column] = {"request": np.arange(len(table)), "arrival_s": table.arrival_s, "isl": table.isl}
    columns |= {"osl": table.osl, "cached": table.cached, "preemptions": table.preemptions, "retries": table.retries}
    columns |= {name: getattr(table, name) for name in TIMES}
    columns |= {name: getattr(table, name) for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s")}
    columns["finish"] = [FINISH[code] for code in table.finish.tolist()]
    return columns


def check_requests_file(path: Path | None) -> None:
    """Refuse a file that cannot be written, before any work is done for it."""
    require_folder("--requests-out", path)
    if path is None:
        return
    if path.suffix not in (".csv", ".parquet"):
        raise SpecError(f"--requests-out={str(path)!r}: must end in .csv or .parquet")
    if path.suffix == ".parquet":
        _require_pyarrow()


def write_requests(result: SimResult, path: Path) -> None:
    """Write the requests whole or not at all. SpecError for another ending than .csv and .parquet, or without pyarrow."""
    check_requests_file(path)
    columns = request_columns(result)
    if path.suffix == ".csv":
        return write_whole(path, csv_text(columns))
    import pyarrow
    from pyarrow import parquet

    arrays = {name: pyarrow.array(values, from_pandas=True) for name, values in columns.items()}
    unfinished = path.with_name(f".{path.name}.part")
    try:
        parquet.write_table(pyarrow.table(arrays), unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_series(result: SimResult, path: Path) -> None:
    """Write the time series as CSV, one line a window."""
    write_whole(path, csv_text(dict(result.series)))


def csv_text(columns: dict[str, Column]) -> str:
    """Columns of equal length as CSV; floats in the fewest digits that read back as the same number, NaN as an empty cell."""
    cells = [_cells(values) for values in columns.values()]
    out = io.StringIO()
    out.write(",".join(columns) + "\n")
    out.writelines(",".join(row) + "\n" for row in zip(*cells, strict=True))
    return out.getvalue()


def _cells(values: Column) -> list[str]:
    if isinstance(values, list):
        return values
    return ["" if value != value else repr(value) for value in values.tolist()]


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as missing:
        raise SpecError(
            f"{missing.name} is not installed, and parquet needs it; name a .csv file, or `pip install 'tandem-lm[calibrate]'`"
        ) from None
