"""`tandem estimate`: one case or a CSV of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import track

from tandem.cli.app import emit
from tandem.perf.backend import ServingFits
from tandem.perf.cases import estimate_cases, read_cases
from tandem.perf.estimate import estimate
from tandem.report import text
from tandem.spec.design import Estimate


def run_one(json_out: bool, **case: Any) -> None:
    """Estimate one case and print it."""
    found = estimate(**case | {"fits": ServingFits.read(case["fits"]) if case["fits"] else None})
    if json_out:
        return emit(found.to_json())
    p = case["parallelism"]
    title = f"{case['model']} on {case['hardware']} ({p}), ISL {case['isl']:,}, OSL {case['osl']:,}"
    text.console().print(text.estimate_table(title, found))


def run_cases(path: Path, fits: Path | None, json_out: bool) -> None:
    """Estimate every row of a CSV; a row that cannot be estimated says why and the others go on."""
    rows, own = read_cases(path), ServingFits.read(fits) if fits else None
    answers = list(
        track(
            estimate_cases(rows, fits=own),
            total=len(rows),
            description="estimating",
            console=text.progress_console(),
            transient=True,
        )
    )
    if json_out:
        return emit({"rows": answers})
    t = text.table(f"{path.name}: {len(rows)} cases", "id", ">TTFT", ">TPOT", ">tok/s/GPU", ">tok/s/user", "evidence or error")
    for a in answers:
        if "error" in a:
            t.add_row(a["id"], "", "", "", "", a["error"])
            continue
        ttft, tpot, per_gpu, per_user = (
            Estimate(**a[k]) for k in ("ttft_s", "tpot_s", "tokens_per_s_per_gpu", "tokens_per_s_per_user")
        )
        t.add_row(a["id"], text.ms(ttft.value), text.span_ms(tpot), text.span(per_gpu), text.span(per_user), a["evidence"])
    text.console().print(t)
