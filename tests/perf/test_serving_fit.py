"""Backend fits find the coefficients that made the times; measured rows are read, split and judged as documented."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.backend import KERNELS_ONLY, BackendFit, find_backend, load_backends, parse_backends
from tandem.perf.calibrate_serving import (
    TERMS,
    calibrate_serving,
    fit_terms,
    format_backends,
    group_rows,
    layout_arrays,
    row_terms,
)
from tandem.perf.phases import PerfModel
from tandem.perf.silicon import MeasuredRow, read_colocated, sample_path, side_of
from tandem.perf.validate import ErrorSet, Predictions, error_sets, predict
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.workload import Workload

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
NO_PULL = np.zeros(5)
COLUMNS = [
    "id", "silicon_data_source", "backend", "model_path", "system", "precision", "mode", "isl", "osl", "batch_size", "tp_size",
    "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms",
]  # fmt: skip
VALUES = ["r_c8_x", "db", "vllm", LLAMA, "h100_sxm", "fp8", "agg", "1024", "512", "8", "2", "1", "1", "1", "", "150.5", "7.25"]
LINE = dict(zip(COLUMNS, VALUES, strict=True))


def row(**changes: object) -> MeasuredRow:
    base = MeasuredRow(
        row_id="r", model=load_spec(LLAMA), hardware=load_hardware("h100-sxm"), backend="vllm",
        precision=Precision.parse("fp8"), parallelism=Parallelism(), isl=1024, osl=512, concurrency=8,
        ttft_s=0.1, tpot_s=0.01, side="calibration",
    )  # fmt: skip
    return replace(base, **changes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 2), min_size=5, max_size=5), st.integers(0, 10**6))
def test_fit_terms_recovers_known_coefficients(known: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms = np.exp(rng.normal(0, 1, (200, 5)))
    assert fit_terms(terms, terms @ known, np.ones(5), NO_PULL) == pytest.approx(known, rel=1e-6)


def test_fit_terms_shrugs_off_outliers_and_never_goes_below_zero() -> None:
    rng = np.random.default_rng(3)
    terms, known = np.exp(rng.normal(0, 1, (400, 5))), np.array([1.0, 0.0, 0.5, 2.0, 0.3])
    measured = terms @ known
    measured[::10] *= 3
    found = fit_terms(terms, measured, np.zeros(5), NO_PULL)
    assert found == pytest.approx(known, abs=0.004)
    opposed = terms @ np.array([1.0, 0.0, 1.0, 1.0, 1.0]) - 0.2 * terms[:, 1]
    assert np.all(fit_terms(terms, np.maximum(opposed, 0.01), np.zeros(5), NO_PULL) >= 0)


def test_a_prior_holds_what_the_rows_cannot_tell() -> None:
    """Two terms that are always alike: the data fix their sum, the prior their shares; many rows outweigh it."""
    one = np.linspace(1, 3, 50)
    terms = np.stack([one, one, np.zeros(50), np.zeros(50), np.zeros(50)], axis=1)
    found = fit_terms(terms, 2.0 * one, np.array([1.5, 0.5, 0, 0, 0]), np.full(5, 8.0))
    assert found[:2] == pytest.approx([1.5, 0.5], rel=1e-3)
    weak = fit_terms(terms[:, :5] * [1, 0, 0, 0, 0], 2.0 * one, np.array([1.0, 0, 0, 0, 0]), np.full(5, 1.0))
    assert weak[0] == pytest.approx(2.0, rel=0.02)


def synthetic(fit: BackendFit) -> list[MeasuredRow]:
    """Rows that a backend with exactly these coefficients would show, by the formula in backend.py."""
    settings_ = [(isl, osl, tp) for isl in (256, 1024, 8192) for osl in (128, 2048) for tp in (1, 2, 4)]
    rows = []
    for isl, osl, tp in settings_:
        for concurrency in (1, 4, 16, 64, 128):
            rows.append(row(isl=isl, osl=osl, concurrency=concurrency, parallelism=Parallelism(tp=tp)))
    made = []
    for group in group_rows(rows).values():
        seconds = row_terms(group) @ [getattr(fit, name) for name in TERMS]
        made += [replace(r, tpot_s=float(s)) for r, s in zip(group, seconds, strict=True)]
    return made


def test_calibration_recovers_the_backend_that_made_the_rows() -> None:
    true = replace(KERNELS_ONLY, step_s=2e-3, sequence_s=3e-5, launch_scale=0.5, work_scale=0.9, prefill_scale=0.8)
    (found,) = calibrate_serving(synthetic(true))
    assert (found.backend, found.generation, found.family, found.num_rows) == ("vllm", "Hopper", "dense", 90)
    for name in TERMS:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.15), name
    assert (found.sequences_max, found.isl_max) == (128, 8192)
    assert 0.97 < found.tpot_p10 <= found.tpot_p90 < 1.03


def test_terms_are_those_that_the_prediction_adds_up() -> None:
    """Coefficients times terms is what `colocated` then predicts: fitting and predicting cannot drift apart."""
    fit = find_backend("vllm", "Hopper", load_spec(LLAMA))[0]
    r = row(concurrency=12, parallelism=Parallelism(tp=2))
    bare = replace(KERNELS_ONLY, prefill_scale=fit.prefill_scale)
    perf = PerfModel(r.model, r.hardware, r.precision, r.backend, given_fit=bare)
    served = perf.colocated(layout_arrays([r]), np.array([12.0]), Workload.fixed(r.isl, r.osl), closed_loop=True)
    summed = row_terms([r]) @ [0.0, 0.0, 1.0, 1.0, fit.prefill_scale]
    assert served.tpot_s == pytest.approx(summed, rel=1e-9)


def test_calibration_refuses_rows_that_are_for_judging() -> None:
    with pytest.raises(TandemError, match="validation rows among them"):
        calibrate_serving([row(), row(side="validation")])
    with pytest.raises(TandemError, match="none left"):
        calibrate_serving([])


def test_the_split_is_the_published_checksum() -> None:
    """facts/validation.md: crc32 of model|system|precision|isl|osl modulo 4; zlib gives these values for these texts."""
    golden = {
        ("a", "b", "c", "1", "2"): 2_812_833_668,
        ("meta-llama/Llama-3.1-8B", "h200_sxm", "fp8", "1024", "1024"): 2_397_943_162,
    }
    for key, checksum in golden.items():
        assert zlib.crc32("|".join(key).encode()) == checksum
        assert side_of(*key) == ("validation" if checksum % 4 == 0 else "calibration")
    assert [side_of(*key) for key in golden] == ["validation", "calibration"]
    many = [side_of(LLAMA, "h200_sxm", "fp8", str(i), str(j)) for i in range(50) for j in range(50)]
    assert many.count("validation") / len(many) == pytest.approx(0.25, abs=0.03)


def write(path: Path, *lines: dict[str, str], columns: list[str] = COLUMNS) -> Path:
    text = [",".join(columns)] + [",".join(line[c] for c in columns) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_a_row_is_read_in_seconds_with_all_its_parallelism(tmp_path: Path) -> None:
    (found,) = read_colocated(write(tmp_path / "s.csv", LINE))
    assert (found.ttft_s, found.tpot_s) == pytest.approx((0.1505, 0.00725))
    assert (found.isl, found.osl, found.concurrency, found.backend) == (1024, 512, 8, "vllm")
    assert found.parallelism == Parallelism(tp=2)
    assert (found.model.name, found.hardware.name, str(found.precision)) == (LLAMA, "h100-sxm", "fp8/fp8/fp8")
    assert found.side == side_of(LLAMA, "h100_sxm", "fp8", "1024", "512")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"id": "r", "silicon_data_source": "x; silicon_concurrency=8; y"}, True),
        ({"id": "r_c9_x", "silicon_data_source": "silicon_concurrency=8"}, True),  # the stated one counts
        ({"id": "r_c8"}, True),
        ({"id": "r"}, False),  # concurrency unknown
        ({"id": "r_c9_x"}, False),  # is not batch x attention groups
        ({"batch_size": "4", "attention_dp_size": "2", "tp_size": "1"}, True),
        ({"batch_size": "8", "attention_dp_size": "2", "tp_size": "1"}, False),
        ({"tp_size": "16"}, False),  # more than 8 GPUs
        ({"tp_size": "4", "pp_size": "4"}, False),
        ({"moe_tp_size": "2", "moe_ep_size": "1"}, True),
        ({"moe_tp_size": "8", "moe_ep_size": "8"}, False),  # a conversion artefact
        ({"mode": "disagg"}, False),
    ],
)
def test_rows_are_kept_as_documented(tmp_path: Path, changes: dict[str, str], kept: bool) -> None:
    assert len(list(read_colocated(write(tmp_path / "s.csv", {**LINE, **changes})))) == kept


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_refused(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "s.csv", LINE, columns=[c for c in COLUMNS if c != column])
    with pytest.raises(SpecError, match=f"s.csv: has no column {column};"):
        list(read_colocated(file))


def test_no_setting_is_on_both_sides_of_the_split() -> None:
    pytest.importorskip("aiconfigurator_core")
    sides: dict[tuple[str, ...], set[str]] = {}
    for r in read_colocated(sample_path()):
        sides.setdefault((r.model.name, r.hardware.name, str(r.precision), str(r.isl), str(r.osl)), set()).add(r.side)
    assert {s for group in sides.values() for s in group} == {"calibration", "validation"}
    assert {k for k, v in sides.items() if len(v) > 1} == set()


def test_fits_survive_being_written_and_read() -> None:
    shipped = list(load_backends())
    assert parse_backends(format_backends(shipped, "here")) == shipped
    assert {f.backend for f in shipped} == {"vllm", "sglang", "trtllm"}
    assert len({(f.backend, f.generation, f.family) for f in shipped}) == len(shipped)
    with pytest.raises(SpecError, match="step_s=-1"):
        replace(shipped[0], step_s=-1.0)


def judged(rows: list[MeasuredRow], ttft: list[float], tpot: list[float], width: float) -> dict[tuple[str, str, str], ErrorSet]:
    times = {"ttft_s": np.array(ttft), "tpot_s": np.array(tpot)}
    low, high = ({k: t * factor for k, t in times.items()} for factor in (1 - width, 1 + width))
    return {(e.side, e.name, e.metric): e for e in error_sets(Predictions(rows, times["ttft_s"], times["tpot_s"], low, high))}


def test_errors_of_a_hand_example() -> None:
    """TPOT ratios 1.1, 0.8 and 1: errors 10, 20 and 0 %; +-10 % round the prediction hold two of three measured values."""
    rows = [row(tpot_s=0.010, ttft_s=1.0), row(tpot_s=0.020, ttft_s=2.0), row(tpot_s=0.030, ttft_s=4.0, backend="sglang")]
    found = judged(rows, [2.0, 2.0, 1.0], [0.011, 0.016, 0.030], 0.1)
    every, ttft = found["calibration", "all", "tpot_s"], found["calibration", "all", "ttft_s"]
    assert (every.n, every.median_ape, every.mean_ape, every.ratio) == pytest.approx((3, 0.1, 0.1, 1.0))
    assert every.coverage == pytest.approx(2 / 3)
    assert (ttft.median_ape, ttft.mean_ape, ttft.ratio) == pytest.approx((0.75, 1.75 / 3, 1.0))
    assert ttft.coverage == pytest.approx(1 / 3)
    assert found["calibration", "sglang", "tpot_s"].n == 1
    assert found["calibration", "dense vllm h100-sxm", "tpot_s"].mean_ape == pytest.approx(0.15)


def test_sides_are_judged_apart_and_validation_comes_first() -> None:
    found = judged([row(), row(side="validation")], [0.1, 0.1], [0.01, 0.02], 0.5)
    assert next(iter(found)) == ("validation", "all", "tpot_s")
    means = {side: found[side, "all", "tpot_s"].mean_ape for side in ("validation", "calibration")}
    assert means == pytest.approx({"validation": 1.0, "calibration": 0.0})
    assert [found[side, "all", "tpot_s"].n for side in means] == [1, 1]


def test_predictions_stay_with_their_rows() -> None:
    """Rows of different settings are priced group by group; each keeps its own prediction, inside its interval."""
    rows = [row(concurrency=c, isl=isl) for c, isl in ((1, 256), (64, 8192), (2, 256), (8, 1024))]
    p = predict(rows)
    for i, r in enumerate(p.rows):
        alone = predict([r])
        assert (p.tpot_s[i], p.ttft_s[i]) == pytest.approx((alone.tpot_s[0], alone.ttft_s[0]))
    for metric in ("ttft_s", "tpot_s"):
        assert np.all((p.low[metric] <= getattr(p, metric)) & (getattr(p, metric) <= p.high[metric]))
    assert sorted((r.concurrency, r.isl) for r in p.rows) == sorted((r.concurrency, r.isl) for r in rows)
