"""Plans of the recipes: paper A's numbers, exact steps, an independent count of FLOPs, and refusals in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from tandem.model.hybrid import Decoder
from tandem.perf.training_time import CpuRates
from tandem.report.training_text import duration, plan_sentences, plan_text
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.train.plan import TrainingPlan, measure_cpu, plan_run, training_step
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import load_recipe, recipe_names
from tandem.train.schedule import learning_rate

CONTRACT = {"parameters", "tokens", "flops", "bytes_per_rank", "seconds"}
RATES = CpuRates(1e11, 1e10)


def recipe(name: str, *changes: str) -> Recipe:
    return load_recipe(name, changes)[0]


def plan(name: str, *changes: str) -> TrainingPlan:
    return plan_run(recipe(name, *changes), rates=RATES)


def paper_flops(tokens_per_sequence: int) -> float:
    """FLOPs of a token of the 12B model, written out with the sizes of paper A's Table 1 as NVIDIA's configuration has them:
    three times a forward pass of twice the weights, of the pairs of attention, and of the scan in chunks of 64."""
    h, vocab, ffn, inner, state, groups, heads = 5120, 131072, 20480, 10240, 128, 8, 128
    mamba = h * (2 * inner + 2 * groups * state + heads) + inner * h
    attention = h * (40 + 2 * 8) * 128 + 40 * 128 * h
    weights = 28 * mamba + 28 * 2 * h * ffn + 6 * attention + vocab * h
    pairs = 6 * 2 * 40 * 128 * (tokens_per_sequence + 1) / 2
    scan = 28 * (2 * inner * state + 64 * (groups * state + inner) + 4 * (inner + 2 * groups * state))
    return 3 * 2 * (weights + pairs + scan)


def test_12b_base_has_the_papers_numbers() -> None:
    """Facts: paper A, section 2: 20T tokens, 768 sequences of 8,192, decay over the last 18 %, phases at 60 % and 90 %."""
    p = plan("12b-base")
    assert p.parameters == p.active_parameters == 12_310_001_152
    assert p.tokens == 20_000_000_000_000
    assert p.tokens_per_step == 6_291_456
    assert p.steps == 3_178_915  # 3,178,914.4 rounded up
    assert p.flops == pytest.approx(paper_flops(8192) * p.steps * p.tokens_per_step, rel=1e-9)
    assert p.flops == pytest.approx(6 * 12.31e9 * 20e12, rel=0.03)
    assert [phase.begins_step for phase in p.phases] == [0, 1_907_349, 2_861_023]
    assert p.decay_begins_step == 3_178_915 - 572_205
    part = recipe("12b-base").optimiser
    assert learning_rate(p.decay_begins_step - 1, p.steps, part) == 4.5e-4
    assert learning_rate(p.decay_begins_step, p.steps, part) < 4.5e-4
    assert learning_rate(p.steps - 1, p.steps, part) == pytest.approx(4.5e-6, rel=1e-12)
    assert (part.weight_decay, part.beta1, part.beta2, part.clip) == (0.1, 0.9, 0.95, 1.0)
    assert p.fits
    assert p.bytes_per_rank.total < 80e9
    assert 0.3 < p.mfu < 0.8
    assert p.plan_only


def test_12b_long_has_the_papers_numbers() -> None:
    """Facts: paper A, section 2: 18.9B tokens, 12 sequences of 524,288, a constant 4.5e-6, TP8 x CP16, 80 % of phase three."""
    p, r = plan("12b-long"), recipe("12b-long")
    assert p.parameters == 12_310_001_152
    assert (p.tokens, p.tokens_per_step, p.steps) == (18_900_000_000, 6_291_456, 3005)
    assert {learning_rate(step, p.steps, r.optimiser) for step in range(p.steps)} == {4.5e-6}
    assert (r.parallel.tp, r.parallel.cp, r.model.initial) == (8, 16, "12b-base")
    assert p.flops == pytest.approx(paper_flops(524_288) * p.steps * p.tokens_per_step, rel=1e-9)
    assert p.fits
    base = recipe("12b-base").data.phases[-1].weights
    assert p.phases[0].weights == pytest.approx({**{k: 0.8 * v for k, v in base.items()}, "long-questions": 0.2})


def test_kept_linears_are_those_that_training_keeps() -> None:
    precision = pytest.importorskip("tandem.train.precision")
    p, r = plan("12b-base"), recipe("12b-base")
    decoder = Decoder(load_spec(str(r.model.name)), device="meta")
    every = {name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    precision.apply_precision(decoder, r.precision)
    assert len(every) == p.linears == 136
    assert len(p.kept_linears) == 8
    modules = dict(decoder.named_modules())
    kinds = {name: type(modules[name]).__name__ for name in every}
    assert {name for name, kind in kinds.items() if kind == "Bf16Linear"} == set(p.kept_linears)
    assert sum(kind == "Fp8Linear" for kind in kinds.values()) == p.fp8_linears


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_planned_and_drawn(name: str) -> None:
    p = plan(name)
    data = p.to_json()
    assert data.keys() >= CONTRACT
    assert json.loads(json.dumps(data)) == data
    held = data["bytes_per_rank"]
    assert held["total"] == sum(size for part, size in held.items() if part != "total")
    assert data["seconds"]["low"] <= data["seconds"]["value"] <= data["seconds"]["high"]
    assert sum(data["flops_by_layer"].values()) == pytest.approx(data["flops"])
    assert data["hardware_flops"] > data["flops"]
    assert data["fits"]
    console = Console(width=120, highlight=False)
    with console.capture() as drawn:
        console.print(plan_text(data))
    assert f"{p.parameters:,}" in drawn.get()
    assert duration(p.seconds.value) in drawn.get()


def test_hardware_and_gpus_replace_the_recipes() -> None:
    r = recipe("12b-base")
    wide = plan_run(r, "b200-sxm", 256)
    assert (wide.hardware, wide.gpus) == ("b200-sxm", 256)
    assert wide.seconds.value > plan_run(r, "b200-sxm").seconds.value
    assert plan_run(r, "b200-sxm").seconds.value < plan_run(r).seconds.value
    here = plan_run(r, "cpu", rates=RATES)
    assert (here.hardware, here.mfu < 1) == ("cpu", True)


def test_a_run_that_does_not_fit_says_what_takes_most() -> None:
    p = plan("12b-base", "parallel.tp=1", "parallel.gpus=64", "batch.micro=12")
    assert not p.fits
    assert p.largest_part == "activations"
    assert any("does not fit" in text and "parallel.recompute=full" in text for text in plan_sentences(p.to_json()))
    assert plan("12b-base", "parallel.tp=1", "parallel.gpus=768", "parallel.recompute=full").fits


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    p = plan("nano-hybrid", "batch.tokens=4097")
    assert (p.tokens, p.steps) == (4097, 2)
    one = plan("nano-hybrid", "batch.tokens=4096")
    assert p.flops == pytest.approx(2 * one.flops)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("parallel.gpus=2", "parallel.tp=4"), "gpus=2: must be a multiple of parallel.tp x parallel.cp = 4"),
        (("parallel.gpus=16",), "batch.sequences=8: fewer than 16 groups of ranks"),
        (("batch.micro=3",), "batch.micro=3: must divide batch.sequences=8"),
        (("parallel.tp=5", "parallel.gpus=5"), "tp=5: does not divide"),
        (("hardware=h1000",), "h1000"),
        (("hardware=h100-sxm", "precision.linears=fp32"), "precision.linears='fp32'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        plan("nano-hybrid", *changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_micro_batches_default_to_all_at_once() -> None:
    r = recipe("12b-base")
    assert training_step(r).micro == 3
    assert training_step(r, 256).micro == 12
    small = replace(r, batch=replace(r.batch, micro=1))
    assert (training_step(small).passes, training_step(r).passes) == (3, 1)


def test_a_cpu_is_measured_where_no_rates_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.train.plan._PASS_S", 0.05)
    small = ("batch.sequence_length=64", "batch.sequences=2")
    r = recipe("nano-hybrid", *small)
    rates = measure_cpu(plan_spec(r), r.precision)
    assert min(rates) > 0
    p = plan_run(r)
    assert p.hardware == "cpu"
    assert p.seconds.evidence == "calibrated"
    each, planned = p.seconds_per_step, plan("nano-hybrid", *small).seconds_per_step
    assert each.head / each.linears == pytest.approx(planned.head / planned.linears)  # in proportion, whatever was measured
    assert p.seconds.value == pytest.approx(each.total * p.steps)
    assert any("measured here" in text for text in plan_sentences(p.to_json()))


def plan_spec(r: Recipe) -> Any:
    from tandem.train.build import model_spec

    return model_spec(r)


def test_planning_for_gpus_needs_no_torch() -> None:
    code = """
import sys
from tandem.train.plan import plan_run
from tandem.train.recipe_files import load_recipe
plan_run(load_recipe("12b-base")[0])
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
