"""Training terms against torch itself: FLOPs as its counter sees them, memory as its profiler does; and laws of both.

Torch's counter knows products only, so convolutions are not in what it is compared with; attention is run as plain products,
of which it counts the whole square where ours counts the pairs that are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tandem.model import scan
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.model.native import build, tasks
from tandem.perf import training_memory
from tandem.perf.training import (
    SCAN_CHUNK,
    LinearFormats,
    Recompute,
    TrainingStep,
    flops_per_token,
    linears,
    step_flops,
)
from tandem.perf.training_memory import kept_bytes, rank_memory, saved_activation_bytes
from tandem.perf.training_time import CpuRates, cpu_step_seconds, estimate_of, gpu_step_seconds
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import MLA, MLP, Attention, Mamba2, Mixer, ModelSpec, MoE, Rope
from tandem.train.loss import Trainee
from tandem.train.trainee import _KEPT

NANO_12B = load_spec("nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base")
MAMBA = Mamba2(num_heads=4, head_dim=16, state_dim=32, groups=2)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=16)
ROTATED = Attention(num_heads=4, num_kv_heads=2, head_dim=16, rope=Rope(theta=1e4))
SQUARED, GATED = MLP(ffn_size=160, gated=False), MLP(ffn_size=96, gated=True)
EXPERTS = MoE(num_experts=8, top_k=2, ffn_size=48, gated=False, shared_ffn_size=64, router_bias=True, score="sigmoid")


def spec_of(*layers: Mixer, vocab: int = 96) -> ModelSpec:
    return ModelSpec(name="tiny", vocab_size=vocab, hidden_size=64, layers=layers, max_context=1024)


def counted(spec: ModelSpec, tokens: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """FLOPs of forward and backward by torch operator, all of it in torch's own operators."""
    monkeypatch.setattr(tasks, "usable", lambda *tensors: False)
    model = Decoder(spec, seed=0)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids).sum().backward()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("layers", [(MAMBA, SQUARED), (ATTENTION, GATED), (MAMBA, SQUARED, ROTATED, SQUARED, MAMBA)])
def test_flops_are_those_torch_counts(layers: tuple[Mixer, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tokens = spec_of(*layers), 128
    ours = step_flops(spec, TrainingStep(sequence_length=tokens, sequences=1, micro=1)).forward
    torchs = counted(spec, tokens, monkeypatch)
    assert torchs["aten.mm"] == 3 * (ours.linears + ours.head)
    seen = (tokens + 1) / (2 * tokens)  # of the square of queries and keys
    assert torchs.get("aten.bmm", 0) == pytest.approx(3 * (ours.scan + ours.attention / seen), rel=1e-12)


def test_experts_are_counted_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token goes to top_k experts, however they are spread."""
    spec = spec_of(ATTENTION, EXPERTS)
    ours = step_flops(spec, TrainingStep(sequence_length=64, sequences=1, micro=1)).forward
    assert counted(spec, 64, monkeypatch)["aten.mm"] == 3 * (ours.linears + ours.head)


def test_chunks_are_the_decoders() -> None:
    assert SCAN_CHUNK == scan.CHUNK == training_memory._NATIVE_CHUNK


def test_linears_are_the_decoders_in_order_of_execution() -> None:
    spec = spec_of(MAMBA, GATED, ROTATED, EXPERTS, SQUARED)
    model, ran = Decoder(spec, seed=0), []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.register_forward_hook(lambda m, *_, name=name: ran.append((name, m.out_features, m.in_features)))
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert ran == [(shape.path, shape.rows, shape.width) for shape in linears(spec)]


def test_kept_linears_are_the_first_and_last_two_layers_of_12b() -> None:
    """Paper A: four linears at each end in bf16; NVIDIA's script says two single-mixer layers: the same."""
    formats = LinearFormats(linears="fp8_block", keep_first=4, keep_last=4).of(NANO_12B)
    kept = {shape.layer for shape, kind in formats if kind == "bf16"}
    assert kept == {0, 1, 60, 61}
    assert sum(kind == "bf16" for _, kind in formats) == 8
    assert {kind for _, kind in LinearFormats(linears="fp32").of(NANO_12B)} == {"fp32"}


def test_model_flops_beside_six_times_weights_times_tokens() -> None:
    """6 N T counts every weight once in three products: it has the embedding too much, attention and scan too little."""
    step = TrainingStep(sequence_length=8192, sequences=768, micro=3, gpus=1024, tp=4)
    flops = step_flops(NANO_12B, step)
    weights = sum(s.rows * s.width for s in linears(NANO_12B)) + NANO_12B.vocab_size * NANO_12B.hidden_size
    assert 3 * (flops.forward.linears + flops.forward.head) == 6 * weights * step.tokens
    assert flops.model / (6 * NANO_12B.parameters * step.tokens) == pytest.approx(0.9735, abs=5e-4)
    assert flops_per_token(NANO_12B, 8192) == pytest.approx(flops.model / step.tokens, rel=1e-12)
    assert sum(part.total for part in flops.by_layer.values()) == pytest.approx(flops.forward.total, rel=1e-12)


@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=6), window=st.none() | st.integers(1, 50))
def test_pairs_are_those_that_attention_sees(documents: list[int], window: int | None) -> None:
    length = documents[0]
    step = TrainingStep(sequence_length=length * len(documents), sequences=1, micro=1, document_length=length)
    seen = sum(sum(min(i + 1, window or i + 1) for i in range(length)) for _ in documents)
    assert step.pairs(window) == pytest.approx(seen, rel=1e-12)


@given(st.sampled_from(["none", "selective", "full"]), st.integers(1, 4))
def test_recompute_adds_what_is_made_again_and_nothing_else(recompute: Recompute, sequences: int) -> None:
    spec = spec_of(MAMBA, SQUARED, ATTENTION, SQUARED)
    step = TrainingStep(sequence_length=64, sequences=sequences, micro=1, recompute=recompute)
    flops = step_flops(spec, step)
    f = flops.forward
    again = {"none": 0, "selective": f.scan + f.conv, "full": f.linears + f.attention + f.scan + f.conv}[recompute]
    assert flops.model == pytest.approx(3 * f.total)
    assert flops.hardware == pytest.approx(flops.model + again + 0.5 * f.attention)
    one = step_flops(spec, TrainingStep(sequence_length=64, sequences=1, micro=1))
    assert flops.model == pytest.approx(sequences * one.model, rel=1e-12)


def checkpointed(recompute: Recompute) -> Callable[..., Tensor] | None:
    if recompute == "none":
        return None
    if recompute == "full":
        return partial(checkpoint, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, list(_KEPT))
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def allocations(run: Callable[[], object]) -> tuple[list[int], object]:
    """Bytes allocated (less those freed) by torch on the CPU while `run` runs, in order; its result is alive to the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    results: Any = found.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())], result


def packed(spec: ModelSpec, rows: int, time: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(rows * time).view(rows, time) % spec.vocab_size
    return ids, (torch.arange(time) // 50).expand(rows, -1).contiguous()


RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
needs_native = pytest.mark.skipif(build.available() is not True, reason="the C code does not build here")


@needs_native
@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("layers", [(MAMBA, SQUARED) * 2, (ATTENTION, SQUARED, ROTATED, GATED), (MAMBA,), (GATED,)])
def test_activations_are_what_a_forward_pass_leaves(layers: tuple[Mixer, ...], recompute: Recompute) -> None:
    """The decoder on a CPU, documents packed, as the loop runs it: within 1 % of what torch still holds after the layers, or 64
    bytes a token, for documents' numbers and tables of rotation are not in the plan."""
    rows, time = 2, 256
    spec = spec_of(*layers)
    model = Decoder(spec, seed=0)
    model.backbone.checkpoint = checkpointed(recompute)
    ids, documents = packed(spec, rows, time)
    model.hidden_states(ids, documents=documents).sum().backward()  # what is made once is there
    held, hidden = allocations(lambda: model.hidden_states(ids, documents=documents))
    assert isinstance(hidden, Tensor)
    step = TrainingStep(sequence_length=time, sequences=rows, micro=rows, device="cpu", recompute=recompute)
    assert saved_activation_bytes(spec, step) == pytest.approx(sum(held) - hidden.nbytes, rel=0.01, abs=64 * rows * time)


@needs_native
@pytest.mark.parametrize("vocab", [64, 8192])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_peak_of_a_step_is_within_what_is_planned(vocab: int, recompute: Recompute) -> None:
    """Forward, loss and backward of the loop's own trainee: with gradients a plan is no less than the peak; without them it is
    within 3 % below and 30 % above it."""
    rows, time = 2, 256
    spec = spec_of(*(MAMBA, SQUARED) * 3, ATTENTION, SQUARED, vocab=vocab)
    decoder = Decoder(spec, seed=0)
    decoder.backbone.checkpoint = checkpointed(recompute)
    trainee = Trainee(decoder, torch.matmul)
    ids, documents = packed(spec, rows, time)

    def step() -> None:
        trainee(ids, ids, documents).backward()
        trainee.zero_grad(set_to_none=True)

    step()
    held, peak = 0, 0
    for change in allocations(step)[0]:
        held += change
        peak = max(peak, held)
    plan = rank_memory(spec, TrainingStep(sequence_length=time, sequences=rows, micro=rows, device="cpu", recompute=recompute))
    assert 0.97 * peak <= plan.activations + plan.logits <= 1.3 * peak
    assert peak <= plan.activations + plan.logits + plan.gradients


def test_memory_is_cut_by_ranks_and_falls_with_recompute() -> None:
    def memory(**changed: Any) -> training_memory.RankMemory:
        given: dict[str, Any] = {"sequence_length": 8192, "sequences": 768, "micro": 3, "gpus": 1024, "tp": 4}
        keep = changed.pop("keep", 4)
        formats = LinearFormats(linears=changed.pop("linears", "fp8_block"), keep_first=keep, keep_last=keep)
        return rank_memory(NANO_12B, TrainingStep(**{**given, **changed}, formats=formats))

    base = memory()
    assert base.weights == base.gradients == base.optimiser / 2 == 4 * NANO_12B.parameters / 1024
    kept = [memory(recompute=r).activations for r in RECOMPUTES]
    assert all(more > less for more, less in pairwise(kept))
    assert memory(linears="bf16").activations > base.activations  # inputs of linears are kept in 8 bits
    assert memory(linears="bf16").gathered == base.gathered  # the layers at both ends are in bf16 either way
    assert memory(keep=0).gathered < base.gathered
    assert memory(tp=8, micro=6).activations == pytest.approx(base.activations, rel=0.01)
    several = memory(micro=1)
    assert several.gradients == 4 * NANO_12B.parameters / 4  # of the sums that wait, only tensor parallelism cuts
    assert several.activations < base.activations
    assert base.to_json()["total"] == pytest.approx(base.total, abs=4)


def test_one_rank_gathers_nothing() -> None:
    spec = spec_of(MAMBA, SQUARED)
    memory = rank_memory(spec, TrainingStep(sequence_length=64, sequences=2, micro=1, device="cpu"))
    assert memory.gathered == 0
    assert memory.weights == memory.gradients == 4 * spec.parameters


def test_time_is_less_on_more_gpus_and_never_below_the_peak() -> None:
    h100 = load_hardware("h100-sxm")
    last = float("inf")
    for gpus, micro in ((256, 12), (512, 6), (1024, 3)):
        step = TrainingStep(
            sequence_length=8192, sequences=768, micro=micro, gpus=gpus, tp=4, formats=LinearFormats(linears="fp8_block")
        )
        seconds = gpu_step_seconds(NANO_12B, step, h100)
        found = estimate_of(seconds, NANO_12B, step, h100.peak("fp8"))
        assert found.value == pytest.approx(sum(seconds.to_json().values()))
        assert found.evidence == "roofline"
        assert found.low >= step_flops(NANO_12B, step).model / (gpus * h100.peak("fp8"))
        assert found.value < last
        last = found.value


def test_what_makes_a_step_longer() -> None:
    h100 = load_hardware("h100-sxm")

    def seconds(**changed: Any) -> dict[str, float]:
        given: dict[str, Any] = {"sequence_length": 8192, "sequences": 256, "micro": 1, "gpus": 256}
        formats = LinearFormats(linears=changed.pop("linears", "fp8_block"))
        return gpu_step_seconds(NANO_12B, TrainingStep(**{**given, **changed}, formats=formats), h100).to_json()

    base = seconds()
    assert base["tensor_parallel"] == base["context_parallel"] == 0
    assert seconds(linears="bf16")["linears"] > base["linears"]
    assert seconds(recompute="selective")["scan"] > base["scan"]
    assert seconds(recompute="selective")["linears"] == base["linears"]
    assert seconds(recompute="full")["linears"] > base["linears"]
    assert seconds(tp=2, micro=2)["tensor_parallel"] > 0
    assert seconds(cp=2, micro=2)["context_parallel"] > 0
    assert seconds(document_length=1024)["attention"] < base["attention"]
    tiny = gpu_step_seconds(NANO_12B, TrainingStep(sequence_length=128, sequences=64, micro=1, gpus=64), h100)
    assert tiny.sharding > 0  # few tokens do not hide what is gathered


@settings(max_examples=25)
@given(rate=st.floats(1e9, 1e13), moved=st.floats(1e9, 1e12), recompute=st.sampled_from(RECOMPUTES))
def test_a_cpu_takes_at_least_the_time_of_its_products(rate: float, moved: float, recompute: Recompute) -> None:
    spec = spec_of(MAMBA, SQUARED, ATTENTION, SQUARED)
    step = TrainingStep(sequence_length=64, sequences=4, micro=4, device="cpu", recompute=recompute)
    seconds = cpu_step_seconds(spec, step, CpuRates(rate, moved))
    found = estimate_of(seconds, spec, step, rate)
    assert step_flops(spec, step).model / rate <= found.low * (1 + 1e-12)
    assert found.low <= found.value <= found.high
    timed = seconds.measured(3.0)
    assert timed.computing == pytest.approx(3.0)
    assert timed.total - timed.computing == pytest.approx(seconds.optimiser)
    sure = estimate_of(timed, spec, step, 1e13, "calibrated")
    assert sure.high / sure.value < found.high / found.value
    half = cpu_step_seconds(spec, step, CpuRates(rate / 2, moved / 2))
    assert half.total == pytest.approx(2 * seconds.total)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gpus": 6, "tp": 4}, "gpus=6: must be a multiple of tp x cp = 4"),
        ({"sequences": 5, "gpus": 2}, "sequences=5: must be a multiple of 2"),
        ({"cp": 3, "gpus": 3, "sequence_length": 64}, "cp=3: does not divide sequence_length=64"),
        ({"document_length": 65, "sequence_length": 64}, "document_length=65"),
        ({"micro": 0}, "micro=0"),
    ],
)
def test_steps_that_cannot_be_are_refused_in_one_line(changed: dict[str, int], said: str) -> None:
    given = {"sequence_length": 64, "sequences": 4, "micro": 1, **changed}
    with pytest.raises(SpecError) as refused:
        TrainingStep(**given)  # type: ignore[arg-type]
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_layers_and_formats_that_are_not_planned_are_refused() -> None:
    latent = MLA(num_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    step = TrainingStep(sequence_length=64, sequences=1, micro=1)
    with pytest.raises(SpecError, match="a layer of MLA"):
        step_flops(spec_of(latent), step)
    with pytest.raises(SpecError, match="tp=3: does not divide"):
        TrainingStep(sequence_length=63, sequences=1, micro=1, gpus=3, tp=3).check(NANO_12B)
    fp32 = TrainingStep(sequence_length=64, sequences=1, micro=1, formats=LinearFormats(linears="fp32"))
    with pytest.raises(SpecError, match="no published fp32 peak"):
        gpu_step_seconds(NANO_12B, fp32, load_hardware("h100-sxm"))


@pytest.mark.parametrize("mixer", [MAMBA, ATTENTION, SQUARED, GATED, EXPERTS])
def test_less_is_kept_the_more_is_made_again(mixer: Mixer) -> None:
    spec = spec_of(mixer)
    kept = []
    for recompute in RECOMPUTES:
        step = TrainingStep(sequence_length=64, sequences=1, micro=1, recompute=recompute)
        kept.append(kept_bytes(mixer, step.formats.of(spec), 64, step))
    assert kept[0] > kept[2] == 2 * 64
    assert kept[1] > kept[2]
