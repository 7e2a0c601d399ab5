"""The study of hybrids: its laws on a thin grid, the arithmetic of the state, the stand-ins; once, slowly, the whole of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.cli.studying import run_hybrids
from tandem.perf.costs import Layout
from tandem.perf.phases import PerfModel
from tandem.report.study_html import study_page
from tandem.report.study_text import UNPRINTED
from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload
from tandem.study.hybrids import study_hybrids
from tandem.study.hybrids_cells import Decision, Decisions, Loads, break_even, flips_of, models_of
from tandem.study.hybrids_measures import HybridMeasures, crossing_of, firm_flips, measure, state_of, variants_of
from tandem.study.hybrids_space import PAIRS, PREFILL_HEAVY, SCAN_OPS, TPOTS_S, HybridSpace, ScaledScanModel, Setting, model_of
from tandem.study.result import StudyResult
from tandem.study.sweep import Sweep

IDS = [f"H{i}" for i in range(1, 14)]
DOC = Path(__file__).parents[2] / "docs" / "study-hybrids.md"
NANO, QWEN = PAIRS["9B"].hybrid, PAIRS["9B"].transformer


@pytest.fixture(scope="module")
def small() -> StudyResult:
    """Two prompt and two output lengths, instances of at most 4 GPUs, kernels only."""
    return study_hybrids(engine=False, isls=(512, 8192), osls=(512, 8192), max_instance_gpus=4)


@pytest.fixture(scope="module")
def measured() -> HybridMeasures:
    return measure(HybridSpace(Setting(), isls=(8192,), osls=(512, 8192), max_instance_gpus=4), others=False)


def perf_of(model: str, scan: float | None = None, backend: str = "tandem") -> PerfModel:
    sweep = Sweep.of(model_of(model), "h100-sxm", Workload.fixed(1024, 128), precision="bf16")
    if scan is None:
        return PerfModel(sweep.model, sweep.hardware, sweep.precision, backend)
    return ScaledScanModel(sweep.model, sweep.hardware, sweep.precision, backend, scan=scan)


def test_every_claim_is_there_once_and_says_where_nobody_printed_a_number(small: StudyResult) -> None:
    data = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert [c["id"] for c in data["claims"]] == IDS
    for claim in data["claims"]:
        assert {"id", "printed", "ours", "holds", "why", "source"} <= set(claim)
        assert isinstance(claim["holds"], bool)
        assert claim["why"]
        assert (claim["printed"] is None) == claim["source"].startswith("ours")
    assert {"figures", "points_evaluated", "seconds", "assumptions"} <= set(data)
    assert any("Evidence: backend vllm `transferred`, tandem (kernels alone) `roofline`" in a for a in data["assumptions"])
    assert {s["evidence"] for s in data["findings"]["tandem"]["sides"].values()} == {"roofline"}
    assert 0 < data["points_evaluated"] < data["points_considered"]


def test_its_page_draws_every_figure_and_has_no_empty_section(small: StudyResult) -> None:
    html = study_page("t", "l", small.to_json())
    assert UNPRINTED in html
    assert "What cannot come" not in html
    for figure in small.figures.values():
        assert figure.panels
        assert len(figure.panels) in (2, len(PAIRS))


def test_pairs_are_of_equal_size() -> None:
    for pair in PAIRS.values():
        sizes = [model_of(m).parameters for m in (pair.hybrid, pair.transformer)]
        assert max(sizes) / min(sizes) < 1.09
    # mistralai/Mistral-Nemo-Base-2407 has 12.2 B parameters by its model card.
    assert model_of("Mistral-Nemo-12B").parameters == 12_247_782_400
    whole, cut = model_of("meta-llama/Meta-Llama-3.1-70B"), model_of(PAIRS["56B"].transformer)
    assert len(cut.layers) * 80 == len(whole.layers) * 64
    assert whole.parameters - cut.parameters == 16 * (sum(m.parameters(8192) + 8192 for m in whole.layers[:2]))


def test_a_request_hands_over_s0_and_k_for_each_token() -> None:
    # paper A's model: 27 Mamba-2 layers of 128 heads x 80 x 128 in fp32, windows of 3 x 12,288 in bf16; 4 attention layers
    # of 8 KV heads x 128 (facts checked against transformers by the parity tests of the catalogue).
    precision = Setting().price(model_of(NANO), Workload.fixed(512, 16), 1).sweep.precision
    state = state_of(model_of(NANO), precision)
    assert state.s0_bytes == 27 * (128 * 80 * 128 * 4 + 3 * (128 * 80 + 2 * 8 * 128) * 2)
    assert state.k_bytes == 4 * 2 * 8 * 128 * 2
    one = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
    assert perf_of(NANO).memory.sequence_bytes(one, 3000.0) == pytest.approx(state.at(3000))
    other = state_of(model_of(QWEN), precision)
    cross = crossing_of(state, other)
    assert state.at(cross.transfer_tokens) == pytest.approx(other.at(cross.transfer_tokens))
    assert cross.decode_tokens == 2 * cross.transfer_tokens
    half = state_of(model_of(NANO), replace(precision, state="bf16"))
    assert crossing_of(half, other).transfer_tokens == pytest.approx(cross.transfer_tokens / 2, rel=0.02)


def test_transfer_carries_the_state_of_every_request(measured: HybridMeasures) -> None:
    swept = measured.space.get(NANO, PREFILL_HEAVY)
    split = swept.split()
    assert split.ratio is not None
    bytes_each = measured.states[NANO].at(PREFILL_HEAVY[0])
    requests = split.tokens_per_s_per_gpu * (1 + split.ratio) / PREFILL_HEAVY[1]
    assert swept.transfer(split).ingress_bytes_per_s == pytest.approx(requests * bytes_each)
    assert swept.transfer(split).egress_bytes_per_s * split.ratio == pytest.approx(requests * bytes_each)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scaled_scan_adds_exactly_that_much_of_its_kernels(factor: float) -> None:
    layout, batch, traffic = Layout(2.0, 1.0, 1.0, 1.0, 1.0), np.array([16.0]), Workload.fixed(1024, 128)
    plain, scaled = perf_of(NANO, 1.0), perf_of(NANO, factor)
    parts = plain.pricer.breakdown(layout, plain.decode_load(layout, batch, traffic))
    scan_s = sum(v["seconds"] for k, v in parts.items() if k in SCAN_OPS)
    base, other = (float(p.decode_tpot_s(layout, batch, traffic)[0]) for p in (plain, scaled))
    assert base == pytest.approx(float(perf_of(NANO).decode_tpot_s(layout, batch, traffic)[0]), rel=1e-12)
    assert other - base == pytest.approx((factor - 1.0) * scan_s)
    assert scan_s > 0
    untouched = (float(perf_of(QWEN, f).decode_tpot_s(layout, batch, traffic)[0]) for f in (1.0, factor))
    assert len(set(untouched)) == 1


positive = st.floats(1e-6, 1e-1)


@given(positive, positive, positive, st.integers(2, 10_000), st.floats(1.01, 50.0))
def test_the_law_is_its_closed_form_where_memory_does_not_bind(w: float, c: float, p: float, osl: int, loose: float) -> None:
    share_s = p / (osl - 1)
    tpot = w + (c + share_s) * loose
    u, x = tpot / (tpot - w), c / (c + share_s)
    gain = Loads(w, c, 1.0, p, p, 1e12).gain(tpot, osl)
    assert gain == pytest.approx(u / (x * u + 1 - x), rel=1e-6)
    assert 1 - 1e-9 <= gain <= u * (1 + 1e-9)
    # Decode that is costlier leaves less to gain; a prompt that costs more in the decode pool's layout leaves more.
    assert Loads(w, c, 1.0, p, 2 * p, 1e12).gain(tpot + share_s * loose, osl) > 1  # type: ignore[operator]
    assert Loads(w, c, 1.0, p, p, 1e12).gain(w, osl) is None


def test_the_law_says_what_the_search_finds(measured: HybridMeasures) -> None:
    assert measured.law.cells >= 40
    assert measured.law.error < 0.1
    assert measured.law.agree_clear >= measured.law.agree - 0.05
    for cells in measured.cells.values():
        for key, cell in cells.items():
            if cell.loads is None:
                continue
            # w and c come from two batches of one layout: together they are a step below the bound.
            assert cell.loads.fixed_s < key[2]
            assert 0 < cell.loads.prompt_share(key[1]) < 1
            assert cell.loads.own_prompt_s <= cell.loads.shared_prompt_s * 1.05


def row(gains: dict[int, float | None]) -> Decisions:
    return {(512, osl, 0.02): Decision(g or 1.0, 1.0 if g is not None else 0.0) for osl, g in gains.items()}


def test_break_even_is_where_the_gain_passes_the_threshold() -> None:
    assert str(break_even(row({256: 1.01, 512: 1.0}), 512, 0.02)) == "<256"
    assert str(break_even(row({256: 1.4, 512: 1.2}), 512, 0.02)) == ">512"
    found = break_even(row({256: 1.15, 1024: 0.95}), 512, 0.02)
    assert found.bounded == "inside"
    assert found.osl == pytest.approx(512.0)  # half way of two doublings
    assert break_even(row({256: None, 1024: 0.95}), 512, 0.02).osl == 256.0


def test_every_cell_is_in_one_list() -> None:
    ours, theirs = row({1: 1.2, 2: 1.2, 3: 1.0, 4: 1.0, 5: None}), row({1: 1.1, 2: 1.0, 3: 1.06, 4: 1.02, 5: 1.0})
    ours[512, 6, 0.02] = Decision(0.0, 0.0)
    theirs[512, 6, 0.02] = Decision(1.0, 1.0)
    f = flips_of(ours, theirs)
    assert [[k[1] for k in keys] for keys in f] == [[1], [2, 5], [3], [4], [6]]
    assert f.compared == 5
    assert flips_of(ours, theirs, 1.5).hybrid == [(512, 5, 0.02)]


def test_firm_flips_are_flips_under_every_variant(measured: HybridMeasures) -> None:
    variants = variants_of(measured, None)
    for name, pair in PAIRS.items():
        firm = firm_flips(pair, measured, variants)
        assert set(firm["hybrid"]) <= set(measured.flips[name].hybrid)
        for variant in variants.cells:
            assert set(firm["hybrid"]) <= set(variants.flips(variant, pair, measured).hybrid)
            assert set(firm["transformer"]) <= set(variants.flips(variant, pair, measured).transformer)
        assert set(measured.cells[pair.hybrid]) == {(8192, o, t) for o in (512, 8192) for t in TPOTS_S}
    assert len(models_of(PAIRS["9B"])) == 3


def test_a_file_instead_of_a_folder_is_refused_before_anything_is_priced(tmp_path: Path) -> None:
    taken = tmp_path / "x"
    taken.write_text("")
    with pytest.raises(SpecError, match="is a file; give a folder"):
        run_hybrids(taken, json_out=True)


@pytest.mark.slow
def test_the_whole_study() -> None:
    result = study_hybrids()
    assert result.seconds < 120  # under 60 s on two idle cores; tests share theirs
    assert [c.id for c in result.claims] == IDS
    # The page in docs/ shows these verdicts.
    page = DOC.read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| (H\d+) \|.*\| (holds|no) \|$", page, flags=re.MULTILINE))
    assert shown == {c.id: "holds" if c.holds else "no" for c in result.claims}
    # So it does how many cells flip, by kernels and with the engine's host time.
    flips = next(c for c in result.claims if c.id == "H9").values
    for name, (host_h, host_t, _) in result.findings["variants"]["vllm"].items():
        h, t = len(flips[name]["hybrid"]), len(flips[name]["transformer"])
        assert re.search(rf"^\| {name} \| {h} \| {t} \| [^|]* \| {host_h} and {host_t} \|$", page, flags=re.MULTILINE), name
