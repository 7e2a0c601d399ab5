"""What one rank holds while it trains: its share of weights, gradients and moments, gathered layers, activations, logits.

Weights, gradients and AdamW's two moments are fp32 and cut over all ranks (`fully_shard`). A layer's weights are gathered in
the format of its linears while it runs, two layers at a time, because the next one is fetched meanwhile; embedding and head
stay gathered, in bf16. Activations are what autograd keeps of each layer, in bf16 on GPUs and fp32 on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from tandem.perf.training import LinearFormat, LinearShape, TrainingStep
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import itemsize

_FP32 = 4.0
LOSS_NUMBERS = 2**24
"""Logits that the loss holds at once (tandem/train/loss.py computes it a piece of the tokens at a time)."""
_STATE_ROWS = 16
"""The C code of the scan keeps states with their head size rounded up to this (tandem/model/native/scan.py)."""
_NATIVE_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on a rank at the peak of a step."""

    weights: float
    """fp32, this rank's share."""
    gradients: float
    """fp32, its share; with several passes a step the sums of all weights, which are cut only at the end."""
    optimiser: float
    """AdamW's two moments, fp32, its share."""
    gathered: float
    """Whole weights of the layers at work in the format of their linears, and the gradient of one layer before it is cut."""
    activations: float
    """What autograd keeps of the forward pass; and of the widest layer's backward pass what is more than `logits`, which are
    gone by then."""
    logits: float
    """A piece of the logits twice, the gradient of the head's weights, and its inputs with theirs."""

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    def to_json(self) -> dict[str, int]:
        """Whole bytes of every part, and their total."""
        parts = {f.name: round(getattr(self, f.name)) for f in fields(self)}
        return {**parts, "total": sum(parts.values())}


def rank_memory(model: ModelSpec, step: TrainingStep) -> RankMemory:
    """The parts of a rank's memory for a step; ranks are equal. Raises SpecError for layers that are not trained here."""
    share = _FP32 * model.parameters / step.gpus
    whole = _FP32 * model.parameters / step.tp
    number, h = _number_bytes(step), model.hidden_size
    tokens = step.rank_tokens
    layers = _formats_by_layer(model, step)
    kept = h * number  # the final norm's input
    working = 0.0
    for mixer, formats in zip(model.layers, layers, strict=True):
        of_layer = kept_bytes(mixer, formats, h, step)
        kept += of_layer
        again = _all_kept_bytes(mixer, formats, h, step) - of_layer  # made once more before its backward pass
        working = max(working, again + (2.0 * _widest(mixer) + h) * number)
    rows = min(tokens, LOSS_NUMBERS / model.vocab_size)
    of_loss = 2.0 * _FP32 * rows * model.vocab_size + _FP32 * model.vocab_size * h + 3.0 * number * tokens * h
    return RankMemory(
        weights=share,
        gradients=whole if step.passes > 1 and step.shards > 1 else share,
        optimiser=2.0 * share,
        gathered=_gathered(model, step, layers) if step.shards > 1 else 0.0,
        activations=(tokens * kept + max(0.0, tokens * working - of_loss)) / step.tp,
        logits=of_loss / step.tp,
    )


def saved_activation_bytes(model: ModelSpec, step: TrainingStep) -> float:
    """Bytes that autograd keeps of one pass's layers and final norm on a rank: what `saved_tensors_hooks` counts."""
    h, layers = model.hidden_size, _formats_by_layer(model, step)
    kept = sum(kept_bytes(m, formats, h, step) for m, formats in zip(model.layers, layers, strict=True))
    return step.rank_tokens / step.tp * (kept + h * _number_bytes(step))


def kept_bytes(mixer: Mixer, formats: Sequence[tuple[LinearShape, LinearFormat]], h: int, step: TrainingStep) -> float:
    """Bytes a token that autograd keeps of one layer, before tensor parallelism.

    With recompute `full` that is the layer's input; with `selective` also the results of products and attention.
    """
    number = _number_bytes(step)
    if step.recompute == "full":
        return h * number
    if step.recompute == "none":
        return _all_kept_bytes(mixer, formats, h, step)
    results = float(sum(shape.rows for shape, _ in formats))
    log_sums = 0.0
    if isinstance(mixer, Attention):
        results += mixer.num_heads * mixer.head_dim
        log_sums = _FP32 * mixer.num_heads
    if isinstance(mixer, MoE):
        results += mixer.top_k * (mixer.ffn_size * (1 + mixer.gated) + mixer.expert_width(h)) + mixer.num_experts
    return (h + results) * number + log_sums


def _all_kept_bytes(mixer: Mixer, formats: Sequence[tuple[LinearShape, LinearFormat]], h: int, step: TrainingStep) -> float:
    """The same where nothing is computed again: the layer's input and normed input, and what its mixer keeps."""
    number, cpu = _number_bytes(step), step.device == "cpu"
    inputs = {shape.name.rpartition(".")[2]: _input_bytes(kind, step) for shape, kind in formats}
    normed = h * max(inputs.values(), default=number)
    match mixer:
        case Mamba2():
            mixed = mixer.in_width * number + mixer.d_inner * inputs["out_proj"]
            head = -(-mixer.head_dim // _STATE_ROWS) * _STATE_ROWS if cpu else mixer.head_dim
            mixed += mixer.num_heads * head * number  # y before the gate
            if cpu:
                states = (-(-step.sequence_length // _NATIVE_CHUNK) + 1) / step.sequence_length
                mixed += mixer.num_heads * mixer.state_dim * head * _FP32 * states
        case Attention():
            inner = mixer.num_heads * mixer.head_dim
            mixed = (mixer.q_width + mixer.kv_width + inner) * number + _FP32 * mixer.num_heads
            if mixer.qk_norm != "none":
                mixed += (mixer.q_width + mixer.kv_width / 2) * number
            if inputs["o_proj"] != number or cpu:
                mixed += inner * inputs["o_proj"]  # once more: quantised, or put together from documents
        case MLP():
            mixed = _hidden_bytes(mixer.ffn_size, inputs["down_proj"], gated=mixer.gated, step=step)
        case MoE():
            width = mixer.expert_width(h)
            routed = 2.0 * width * number + _hidden_bytes(mixer.ffn_size, number, gated=mixer.gated, step=step)
            shared = inputs.get("down_proj", number)
            mixed = mixer.top_k * routed + 2.0 * _FP32 * mixer.num_experts
            mixed += _hidden_bytes(mixer.shared_ffn_size, shared, gated=mixer.gated, step=step)
            mixed += 2.0 * (mixer.latent_size or 0) * number
        case _:
            raise AssertionError(mixer)
    return h * number + normed + mixed


def _hidden_bytes(ffn: int, result: float, *, gated: bool, step: TrainingStep) -> float:
    """Of a feed-forward layer inside: squared ReLU keeps its result in C, its root as well elsewhere; a gate three more."""
    number = _number_bytes(step)
    before = 3.0 if gated else 0.0 if step.device == "cpu" else 1.0
    return ffn * (before * number + result)


def _number_bytes(step: TrainingStep) -> float:
    return _FP32 if step.device == "cpu" or step.formats.linears == "fp32" else itemsize("bf16")


def _input_bytes(kind: LinearFormat, step: TrainingStep) -> float:
    """Bytes of a linear's input that is kept for the gradient of its weights: quantised, with a scale for 128, on GPUs."""
    if step.device == "cpu" or kind not in ("fp8_block", "fp8"):
        return _number_bytes(step)
    return itemsize("fp8") + (_FP32 / 128 if kind == "fp8_block" else 0.0)


def _widest(mixer: Mixer) -> float:
    """Numbers a token of the widest tensor within a layer."""
    match mixer:
        case Mamba2():
            return float(mixer.in_width)
        case Attention():
            return float(mixer.q_width + mixer.kv_width)
        case MLP():
            return float(mixer.up_width)
        case MoE():
            return float(max(mixer.top_k * mixer.ffn_size, mixer.shared_ffn_size))
        case _:
            raise AssertionError(mixer)


def _formats_by_layer(model: ModelSpec, step: TrainingStep) -> list[list[tuple[LinearShape, LinearFormat]]]:
    found: list[list[tuple[LinearShape, LinearFormat]]] = [[] for _ in model.layers]
    for shape, kind in step.formats.of(model):
        found[shape.layer].append((shape, kind))
    return found


def working_weight_bytes(
    model: ModelSpec, mixer: Mixer, formats: Sequence[tuple[LinearShape, LinearFormat]], step: TrainingStep
) -> float:
    """Bytes of a layer's whole weights as they are gathered, before tensor parallelism; what is no linear in 16 or 32 bits."""
    in_linears = sum(shape.rows * shape.width for shape, _ in formats)
    rest = mixer.parameters(model.hidden_size) + model.hidden_size - in_linears
    other = _FP32 if step.formats.linears == "fp32" else itemsize("bf16")
    return rest * other + sum(shape.rows * shape.width * itemsize(kind) for shape, kind in formats)


def _gathered(model: ModelSpec, step: TrainingStep, layers: Sequence[Sequence[tuple[LinearShape, LinearFormat]]]) -> float:
    other = _FP32 if step.formats.linears == "fp32" else itemsize("bf16")
    ends = (model.embedding_parameters + model.hidden_size) * other
    sizes = [working_weight_bytes(model, m, f, step) for m, f in zip(model.layers, layers, strict=True)]
    at_work = max((sum(two) for two in pairwise(sizes)), default=sizes[0])
    gradient = _FP32 * max(m.parameters(model.hidden_size) for m, _ in model.mixers)
    return (ends + at_work + gradient) / step.tp
