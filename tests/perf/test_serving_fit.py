"""Backend fits find the coefficients that made the times; measured rows are read, split and judged as documented."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.backend import (
    KERNELS_ONLY,
    PHYSICS,
    TERMS,
    BackendFit,
    ServingFits,
    fingerprint,
    load_serving_fits,
    parse_fits,
)
from tandem.perf.calibrate_serving import (
    Table,
    calibrate_serving,
    format_fits,
    group_rows,
    layout_arrays,
    row_terms,
    ttft_terms,
)
from tandem.perf.hierarchy import Level, fit_hierarchy
from tandem.perf.phases import PerfModel
from tandem.perf.silicon import MeasuredRow, read_rows, sample_path, side_of
from tandem.perf.validate import ErrorSet, Predictions, error_sets, predict
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.workload import Workload

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
MOE = "Qwen/Qwen3-30B-A3B"
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


def one_level(names: list[str], sd: float = 5.0) -> list[Level]:
    return [Level(names, sd, by_term=True)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 2), min_size=5, max_size=5), st.integers(0, 10**6))
def test_the_fit_recovers_known_coefficients(known: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms = np.exp(rng.normal(0, 1, (300, 5)))
    found = fit_hierarchy(terms, terms @ known, [], common_sd=100.0, softness=0.1)
    assert np.exp(found.common) == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_the_fit_shrugs_off_outliers(factor: float) -> None:
    rng = np.random.default_rng(3)
    terms, known = np.exp(rng.normal(0, 1, (400, 4))), np.array([1.0, 0.5, 2.0, 0.3])
    measured = terms @ known
    measured[::10] *= factor
    found = fit_hierarchy(terms, measured, [], common_sd=100.0, softness=0.02)
    assert np.exp(found.common) == pytest.approx(known, rel=0.03)


def test_a_small_group_stays_near_its_parent_and_a_large_one_finds_its_own() -> None:
    """Two groups deviate alike, by a factor of 1.5 in one term; 2 rows move less than 200 rows do."""
    rng = np.random.default_rng(5)
    terms = np.exp(rng.normal(0, 0.3, (602, 2)))
    names = ["base"] * 400 + ["large"] * 200 + ["small"] * 2
    factor = np.where(np.array(names) == "base", 1.0, 1.5)
    measured = terms[:, 0] * factor + terms[:, 1]
    found = fit_hierarchy(terms, measured, one_level(names, 0.05), common_sd=1.0, softness=0.1)
    moved = {name: float(found.deviations[name][0]) for name in ("large", "small")}
    assert 0 < moved["small"] < 0.5 * moved["large"] < np.log(1.5)
    loose = fit_hierarchy(terms, measured, one_level(names, 5.0), common_sd=1.0, softness=0.1)
    assert loose.common[0] + loose.deviations["large"][0] == pytest.approx(np.log(1.5), abs=0.02)
    assert loose.predict(terms[:1], [["never seen"]]) == pytest.approx(np.exp(loose.common) @ terms[0])


def synthetic(fit: BackendFit, **changes: object) -> list[MeasuredRow]:
    """Rows that a backend with exactly these coefficients would show, by the formulas in backend.py."""
    rows = [
        row(isl=isl, osl=osl, concurrency=c, parallelism=Parallelism(tp=tp), **changes)
        for isl in (256, 1024, 8192)
        for osl in (128, 2048)
        for tp in (1, 2, 4)
        for c in (1, 4, 16, 64, 128)
    ]
    made = []
    for group in group_rows(rows).values():
        first = group[0]
        perf = PerfModel(first.model, first.hardware, first.precision, first.backend, given_fit=fit)
        batch = np.array([float(r.concurrency) for r in group])
        served = perf.colocated(layout_arrays(group), batch, Workload.fixed(first.isl, first.osl), closed_loop=True)
        made += [replace(r, ttft_s=t, tpot_s=p) for r, t, p in zip(group, served.ttft_s, served.tpot_s, strict=True)]
    return made


def test_calibration_recovers_the_backend_that_made_the_rows() -> None:
    """Predictions, not single coefficients: terms that always go together share what they explain."""
    true = replace(PHYSICS, step_s=3e-3, sequence_s=2e-5, launch=0.6, prefill=0.8, host_s=0.05, prompt=1.4, burst=0.08)
    made = synthetic(true)
    fits = calibrate_serving(made)
    found, evidence = fits.find("vllm", made[0].hardware, made[0].model, "fp8")
    assert evidence == "calibrated"
    assert (found.num_rows, found.sequences_max, found.isl_max) == (90, 128, 8192)
    again = synthetic(found)
    for metric in TERMS:
        ratio = [getattr(a, f"{metric}_s") / getattr(b, f"{metric}_s") for a, b in zip(again, made, strict=True)]
        assert np.median(np.abs(np.log(ratio))) < 0.02
        assert 0.9 < getattr(found, f"{metric}_p10") <= getattr(found, f"{metric}_p90") < 1.1
    assert fits.find("vllm", load_hardware("b200-sxm"), made[0].model, "fp8")[1] == "transferred"
    assert fits.find("sglang", made[0].hardware, made[0].model, "fp8") == (KERNELS_ONLY, "roofline")


@pytest.mark.parametrize(
    "changes",
    [
        {"parallelism": Parallelism(tp=2)},
        {"model": load_spec(MOE), "parallelism": Parallelism(tp=2, dp=2, ep=4), "backend": "sglang"},
        {"concurrency": 20_000, "isl": 8192},
    ],
)
def test_terms_are_those_that_the_prediction_adds_up(changes: dict[str, object]) -> None:
    """Coefficients times terms is what `colocated` then predicts: fitting and predicting cannot drift apart."""
    r = row(**{"concurrency": 12, **changes})
    fit = load_serving_fits().find(r.backend, r.hardware, r.model, r.precision.weights)[0]
    (p,) = (predict([r]),)
    terms = row_terms([r])
    scale = {m: [getattr(fit, name) / getattr(PHYSICS, name) for name in names] for m, names in TERMS.items()}
    tpot = terms.tpot @ scale["tpot"]
    assert p.tpot_s == pytest.approx(tpot, rel=1e-9)
    assert p.ttft_s == pytest.approx(ttft_terms(terms, tpot, np.array([float(r.osl)])) @ scale["ttft"], rel=1e-9)


def test_held_out_rows_never_reach_the_fit_that_predicts_them() -> None:
    """A part whose rows are all tripled is still predicted as the rest has it."""
    made = synthetic(PHYSICS)
    spoiled = [replace(r, tpot_s=r.tpot_s * (3 if r.isl == 1024 else 1)) for r in made]
    table = Table.of(spoiled)
    found = table.held_out([str(r.isl) for r in table.rows])
    for r, predicted in zip(table.rows, found["tpot"], strict=True):
        if r.isl == 1024:
            assert predicted == pytest.approx(r.tpot_s / 3, rel=0.05)


def test_models_of_one_arithmetic_share_a_fingerprint() -> None:
    same = [fingerprint(load_spec(m)) for m in ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3")]
    assert same[0] == same[1] != fingerprint(load_spec(LLAMA))
    assert fingerprint(load_spec("meta-llama/Llama-3.1-8B-Instruct")) == fingerprint(
        load_spec("nvidia/Llama-3.1-8B-Instruct-FP8")
    )


def test_calibration_refuses_rows_that_are_for_judging() -> None:
    with pytest.raises(TandemError, match="validation rows among them"):
        calibrate_serving([row(), row(side="validation")])
    with pytest.raises(TandemError, match="none left"):
        calibrate_serving([])


def test_the_split_is_the_published_checksum() -> None:
    """docs/accuracy.md: crc32 of model|system|precision|isl|osl modulo 4; zlib gives these values for these texts."""
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
    (found,) = read_rows(write(tmp_path / "s.csv", LINE))
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
    assert len(list(read_rows(write(tmp_path / "s.csv", {**LINE, **changes})))) == kept


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_refused(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "s.csv", LINE, columns=[c for c in COLUMNS if c != column])
    with pytest.raises(SpecError, match=f"s.csv: has no column {column};"):
        list(read_rows(file))


def test_no_setting_is_on_both_sides_of_the_split() -> None:
    pytest.importorskip("aiconfigurator_core")
    sides: dict[tuple[str, ...], set[str]] = {}
    for r in read_rows(sample_path()):
        sides.setdefault((r.model.name, r.hardware.name, str(r.precision), str(r.isl), str(r.osl)), set()).add(r.side)
    assert {s for group in sides.values() for s in group} == {"calibration", "validation"}
    assert {k for k, v in sides.items() if len(v) > 1} == set()


def test_fits_survive_being_written_and_read() -> None:
    shipped = load_serving_fits()
    again = parse_fits(format_fits(shipped, "here"))
    assert "(docs/accuracy.md: " in again.provenance["side"]
    assert (again.common, again.groups, again.spread, again.models) == (
        shipped.common,
        shipped.groups,
        shipped.spread,
        shipped.models,
    )
    assert {name for name in shipped.groups if " " not in name} == {"vllm", "sglang", "trtllm"}
    with pytest.raises(SpecError, match="step_s=-1"):
        replace(PHYSICS, step_s=-1.0)
    with pytest.raises(SpecError, match="not what `tandem calibrate serving --out` writes"):
        parse_fits("groups: 3")


def test_the_shipped_fits_stay_physical() -> None:
    """Away from measured models bf16 matrix multiplications stay near their measured curve, and host time is milliseconds."""
    shipped: ServingFits = load_serving_fits()
    for backend in ("vllm", "sglang", "trtllm"):
        for gpu in ("h100-sxm", "h200-sxm", "b200-sxm", "a10g"):
            for model in ("Qwen/Qwen3-8B", MOE, "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "deepseek-ai/DeepSeek-R1"):
                fit, _ = shipped.find(backend, load_hardware(gpu), load_spec(model), "bf16")
                assert 0.7 <= fit.gemm <= 1.5, (backend, gpu, model)
                assert 0.5e-3 <= fit.step_s <= 6e-3
                assert 0.2 <= fit.launch <= 1.6
                assert fit.tpot_p10 < fit.tpot_p90


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
