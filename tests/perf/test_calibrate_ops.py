"""Fits find the curve that made the measurements; tables with impossible rates are refused; the shipped fits are sound."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tandem.perf import calibrate_ops as calibration
from tandem.perf import op_tables, ops
from tandem.perf.efficiency import SHARPNESS, OpFit, load_fits, parse_fits
from tandem.perf.op_tables import OpTable, check_rates, read_tables
from tandem.perf.ops import Work
from tandem.spec.catalog import load_hardware
from tandem.spec.errors import SpecError, TandemError

PEAK, WIRE = 1e15, 3e12


def shapes(count: int = 2_000) -> Work:
    rng = np.random.default_rng(7)
    m, n, k = (2.0 ** rng.uniform(low, 15, count) for low in (0, 7, 7))
    return ops.gemm(m, n, k, 2.0, 2.0)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize(("t0_s", "ec", "eb"), [(3e-6, 0.75, 0.8), (2e-5, 0.35, 0.5)])
def test_fit_recovers_the_curve(t0_s: float, ec: float, eb: float, sharpness: int) -> None:
    work = shapes()
    noise = np.exp(np.random.default_rng(1).normal(0, 0.03, work.flops.size))
    seconds = calibration.predict_s(work, PEAK, WIRE, t0_s, ec, eb, sharpness) * noise
    fit = calibration.fit_op(work, seconds, PEAK, WIRE, system="toy", op="gemm", dtype="bf16")
    assert fit.sharpness == sharpness
    assert fit.t0_s == pytest.approx(t0_s, rel=0.05)
    assert fit.compute_efficiency == pytest.approx(ec, rel=0.05)
    assert fit.bandwidth_efficiency == pytest.approx(eb, rel=0.05)
    assert fit.ratio_p10 < 1 < fit.ratio_p90
    assert fit.median_ape < 0.05


def test_fit_shrugs_off_stray_rows() -> None:
    work = shapes()
    seconds = calibration.predict_s(work, PEAK, WIRE, 4e-6, 0.7, 0.8, 2)
    seconds[::20] *= 8
    fit = calibration.fit_op(work, seconds, PEAK, WIRE)
    assert (fit.compute_efficiency, fit.bandwidth_efficiency) == pytest.approx((0.7, 0.8), rel=0.05)


def test_unidentified_efficiency_stays_at_the_prior() -> None:
    moved = np.geomspace(1e5, 1e10, 200)
    seconds = 2e-6 + moved / (0.8 * WIRE)
    fit = calibration.fit_op(ops.memory(moved), seconds, PEAK, WIRE, op="memory")
    assert fit.bandwidth_efficiency == pytest.approx(0.8, rel=0.02)
    assert fit.compute_efficiency == pytest.approx(0.7, rel=0.02)


amounts = st.floats(0, 1e16)


@given(amounts, amounts, amounts, st.floats(0, 1e-3), st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(SHARPNESS))
def test_more_work_never_takes_less_time(
    flops: float, moved: float, more: float, t0_s: float, ec: float, eb: float, p: int
) -> None:
    def seconds(f: float, b: float) -> float:
        return float(calibration.predict_s(Work(f, b), PEAK, WIRE, t0_s, ec, eb, p))

    base = seconds(flops, moved)
    assert base >= t0_s
    assert seconds(flops + more, moved) >= base * (1 - 1e-12)
    assert seconds(flops, moved + more) >= base * (1 - 1e-12)


@pytest.fixture
def toy_systems(tmp_path: Path) -> Path:
    """Two versions of a matmul table of `toy_gpu`; the older one is half as fast and has one shape of its own."""
    m, n, k = (a.ravel() for a in np.meshgrid([1, 64, 4096, 16384], [1024, 8192], [1024, 8192]))
    seconds = calibration.predict_s(ops.gemm(m, n, k, 2.0, 2.0), PEAK, WIRE, 3e-6, 0.7, 0.8, 2)
    for version, slowdown, extra in (("1.9.0", 2.0, 1), ("1.10.0rc1", 1.0, 0)):
        folder = tmp_path / "data" / "toy_gpu" / "gemm" / "trtllm" / version
        folder.mkdir(parents=True)
        rows = {
            "gemm_dtype": ["bfloat16"] * (m.size + extra),
            "m": np.append(m, [3] * extra),
            "n": np.append(n, [512] * extra),
            "k": np.append(k, [512] * extra),
            "latency": np.append(seconds * 1e3 * slowdown, [0.01] * extra),
        }
        parquet.write_table(pa.table(rows), folder / "gemm_perf.parquet")
    return tmp_path


def test_newest_version_of_a_shape_wins(toy_systems: Path) -> None:
    (table,) = read_tables(toy_systems, "toy_gpu")
    assert (table.system, table.op, table.dtype) == ("toy_gpu", "gemm", "bf16")
    assert table.seconds.size == 17
    m, n, k = 16384, 8192, 8192
    row = table.work.flops == 2.0 * m * n * k
    expected = calibration.predict_s(ops.gemm(m, n, k, 2.0, 2.0), PEAK, WIRE, 3e-6, 0.7, 0.8, 2)
    assert table.seconds[row] == pytest.approx([float(expected)])
    assert 0.5 < check_rates(table, PEAK, WIRE) < 0.8


def test_collectives_take_the_fastest_backend_and_count_elements(tmp_path: Path) -> None:
    for backend, factor in (("sglang", 1.0), ("vllm", 2.0)):
        folder = tmp_path / "data" / "toy_gpu" / "comm" / backend / "1.0"
        folder.mkdir(parents=True)
        rows = {
            "kernel_source": [f"{backend}_graph", f"{backend}_eager"],
            "allreduce_dtype": ["bfloat16"] * 2,
            "num_gpus": [8, 8],
            "message_size": [1024, 1024],
            "latency": [0.004 * factor, 0.001],
        }
        parquet.write_table(pa.table(rows), folder / "custom_allreduce_perf.parquet")
    (table,) = read_tables(tmp_path, "toy_gpu")
    assert table.op == "allreduce"
    assert table.seconds == pytest.approx([0.004e-3])
    assert table.work.moved_bytes == pytest.approx([2 * 7 / 8 * 1024 * 2])


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_impossible_table_is_refused(factor: float) -> None:
    work = shapes()
    seconds = calibration.predict_s(work, PEAK, WIRE, 3e-6, 0.7, 0.8, 2)
    good = OpTable("toy_gpu", "gemm", "bf16", "toy_gpu/gemm/trtllm/gemm_perf.parquet", work, seconds)
    check_rates(good, PEAK, WIRE)
    with pytest.raises(TandemError, match=r"^toy_gpu/gemm/trtllm/gemm_perf\.parquet \(gemm, bf16\): .* of the peak") as error:
        check_rates(good._replace(seconds=seconds * factor), PEAK, WIRE)
    assert "\n" not in str(error.value)


def test_fit_system_leaves_out_refused_slow_and_cached_rows() -> None:
    hardware = load_hardware("h100-sxm")
    work = shapes()
    peak, wire = hardware.peak("bf16"), hardware.memory_bytes_per_s
    seconds = calibration.predict_s(work, peak, wire, 3e-6, 0.7, 0.8, 2)
    cached = seconds.copy()
    cached[:5] = 1e-9
    tables = [
        OpTable("h100_sxm", "gemm", "bf16", "good", work, cached),
        OpTable("h100_sxm", "gemm", "bf16", "wrong_unit", work, seconds * 1e-3),
        OpTable("h100_sxm", "gemm", "bf16", "slow", work, seconds * 5),
    ]
    said: list[str] = []
    (fit,) = calibration.fit_system(tables, "h100-sxm", said.append)
    assert fit.num_rows == seconds.size - 5
    assert fit.compute_efficiency == pytest.approx(0.7, rel=0.05)
    assert any(line.startswith("refused: wrong_unit") for line in said)
    assert any(line.startswith("left out: slow") for line in said)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="systems='tpu'"):
        calibration.calibrate_ops(["tpu"], print)
    with pytest.raises(SpecError, match="system='tpu'"):
        next(read_tables(tmp_path, "tpu"))


@pytest.mark.parametrize("module", ["scipy.optimize", "pyarrow.parquet"])
def test_missing_extra_says_how_to_install_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TandemError, match=r"pip install 'tandem-lm\[calibrate\]'"):
        op_tables.extra(module)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(TandemError, match=r"pip install 'tandem-lm\[calibrate\]'"):
        calibration.calibrate_ops(["h100-sxm"], print)


def test_written_fits_read_back(tmp_path: Path) -> None:
    fit = OpFit(
        system="h100-sxm", op="gemm", dtype="bf16", num_rows=12, t0_s=2.5e-6, compute_efficiency=0.75,
        bandwidth_efficiency=0.5, sharpness=2, ratio_p10=0.9, ratio_p90=1.25, median_ape=0.08,
    )  # fmt: skip
    path = tmp_path / "fits.csv"
    path.write_text("old")
    calibration.write_fits([fit], path)
    assert parse_fits(path.read_text(encoding="utf-8")) == [fit]
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert list(tmp_path.iterdir()) == [path]


MEASURED = (
    "gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode", "moe", "scan_prefill", "scan_decode",
    "conv_prefill", "conv_decode", "memory", "allreduce", "alltoall", "send",
)  # fmt: skip


@pytest.mark.parametrize("system", ["h100-sxm", "h200-sxm", "b200-sxm"])
def test_shipped_fits_cover_every_class(system: str) -> None:
    fits = load_fits()
    assert {op for name, op, _ in fits if name == system} == set(MEASURED) == set(ops.OP_CLASSES)
    formats = {dtype for name, op, dtype in fits if (name, op) == (system, "gemm")}
    assert formats == {"bf16", "fp8", "fp8_block"} | ({"fp4"} if system.startswith("b") else set())


def test_shipped_fits_are_close_to_their_measurements() -> None:
    # Plain FP8 pools kernels with and without the quantisation of their input: its backends differ by 2 on small shapes.
    bounds = {"gemm": 0.25, "attention_decode": 0.25, "attention_prefill": 0.3, "mla_decode": 0.25, "scan_decode": 0.15}
    for (system, op, dtype), fit in load_fits().items():
        if system in ("h100-sxm", "h200-sxm", "b200-sxm") and op in bounds:
            bound = 0.30 if (op, dtype) == ("gemm", "fp8") else bounds[op]
            assert fit.median_ape <= bound, (system, op, dtype, fit.median_ape)
        assert fit.ratio_p10 <= 1.05, (system, op, dtype)
        assert fit.ratio_p90 >= 0.95, (system, op, dtype)
