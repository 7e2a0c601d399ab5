"""What an optimiser step computes: its linears with their number formats, and floating-point operations by layer kind.

Pure arithmetic, so that a run of any size can be planned without torch. `training_memory` says what a rank holds,
`training_time` how long a step takes. Letters as in `tandem.spec.mixers`: h hidden size, H heads, P head size, N state size,
G groups, Q tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from tandem.perf.divide import refuse_parallelism
from tandem.perf.ops import attended_pairs
from tandem.spec.design import Parallelism
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import require_int

Recompute = Literal["none", "selective", "full"]
LinearFormat = Literal["fp32", "bf16", "fp8_block", "fp8"]

SCAN_CHUNK = 64
"""Tokens of a chunk of the scan, the decoder's (tandem/model/scan.py)."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward kernels over those of the forward pass: four products and the scores once more."""


class LinearShape(NamedTuple):
    """A linear layer: `rows` outputs of `width` inputs; `cut` says which of the two tensor parallelism divides."""

    layer: int
    name: str
    rows: int
    width: int
    cut: Literal["rows", "width"]

    @property
    def path(self) -> str:
        """Its name in the decoder."""
        return f"backbone.layers.{self.layer}.mixer.{self.name}"


def linears(model: ModelSpec) -> tuple[LinearShape, ...]:
    """Every linear of the layers in the order of execution; the head, routers and routed experts are none of them."""
    found = []
    for i, mixer in enumerate(model.layers):
        found += [LinearShape(i, *shape) for shape in _mixer_linears(mixer, model.hidden_size)]
    return tuple(found)


def _mixer_linears(m: Mixer, h: int) -> Iterator[tuple[str, int, int, Literal["rows", "width"]]]:
    match m:
        case Mamba2():
            yield "in_proj", m.in_width, h, "rows"
            yield "out_proj", h, m.d_inner, "width"
        case Attention():
            yield "q_proj", m.q_width, h, "rows"
            yield "k_proj", m.num_kv_heads * m.head_dim, h, "rows"
            yield "v_proj", m.num_kv_heads * m.head_dim, h, "rows"
            yield "o_proj", h, m.num_heads * m.head_dim, "width"
        case MLP():
            if m.gated:
                yield "gate_proj", m.ffn_size, h, "rows"
            yield "up_proj", m.ffn_size, h, "rows"
            yield "down_proj", h, m.ffn_size, "width"
        case MoE():
            if m.latent_size:
                yield "fc1_latent_proj", m.latent_size, h, "rows"
                yield "fc2_latent_proj", h, m.latent_size, "width"
            if m.shared_ffn_size:
                yield "shared_experts.up_proj", m.shared_ffn_size, h, "rows"
                yield "shared_experts.down_proj", h, m.shared_ffn_size, "width"
        case _:
            raise SpecError(
                f"model: has a layer of {type(m).__name__}; training is planned for Mamba-2, attention, MLP and MoE"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearFormats:
    """Operands of the linears. Where they are in 8 bits, `keep_first` and `keep_last` of them stay in bf16 (paper A, 2.4)."""

    linears: LinearFormat = "bf16"
    keep_first: int = 4
    keep_last: int = 4

    def of(self, model: ModelSpec) -> tuple[tuple[LinearShape, LinearFormat], ...]:
        """Every linear of a model with its format, in the order of execution."""
        shapes = linears(model)
        if self.linears not in ("fp8_block", "fp8"):
            return tuple((shape, self.linears) for shape in shapes)
        inside = range(self.keep_first, len(shapes) - self.keep_last)
        return tuple((shape, self.linears if i in inside else "bf16") for i, shape in enumerate(shapes))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """One optimiser step and how it is spread: `gpus` ranks form groups of tp x cp, each takes `micro` sequences a pass.

    Weights, gradients and moments are cut over all ranks (`fully_shard`, ZeRO-3). On a CPU activations are fp32 and the
    Mamba mixer runs in C, which keeps the states between chunks.
    """

    sequence_length: int
    sequences: int
    micro: int
    """Sequences of one pass of a group."""
    document_length: int | None = None
    """Mean tokens of a packed document, beyond which attention does not reach; None: a sequence is one document."""
    gpus: int = 1
    tp: int = 1
    cp: int = 1
    recompute: Recompute = "none"
    formats: LinearFormats = LinearFormats()
    device: Literal["cpu", "gpu"] = "gpu"

    def __post_init__(self) -> None:
        for name in ("sequence_length", "sequences", "micro", "gpus", "tp", "cp"):
            require_int(name, getattr(self, name))
        if self.document_length is not None:
            require_int("document_length", self.document_length, high=self.sequence_length)
        if self.gpus % (self.tp * self.cp):
            raise SpecError(f"gpus={self.gpus}: must be a multiple of tp x cp = {self.tp * self.cp}")
        if self.sequence_length % self.cp:
            raise SpecError(f"cp={self.cp}: does not divide sequence_length={self.sequence_length}")
        if self.sequences % (self.groups * self.micro):
            share = f"{self.groups} groups of tp x cp ranks x micro={self.micro}"
            raise SpecError(f"sequences={self.sequences}: must be a multiple of {self.groups * self.micro} ({share})")

    @property
    def groups(self) -> int:
        """Groups of tp x cp ranks; each works on sequences of its own."""
        return self.gpus // (self.tp * self.cp)

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step, whose gradients are summed."""
        return self.sequences // (self.groups * self.micro)

    @property
    def shards(self) -> int:
        """Ranks that a weight is cut over beyond tensor parallelism."""
        return self.gpus // self.tp

    @property
    def tokens(self) -> int:
        """Positions of the whole step."""
        return self.sequence_length * self.sequences

    @property
    def rank_tokens(self) -> float:
        """Positions of one pass that one rank holds, before tensor parallelism."""
        return self.sequence_length * self.micro / self.cp

    def pairs(self, window: int | None) -> float:
        """Query-key pairs of one sequence in a causal attention layer."""
        reach = self.document_length or self.sequence_length
        return float(attended_pairs(float(reach), 0.0, window)) / reach * self.sequence_length

    def check(self, model: ModelSpec) -> None:
        """Raise a SpecError where the model cannot be cut like this."""
        refused: Infeasible | None = refuse_parallelism(model, Parallelism(tp=self.tp))
        if refused is not None:
            raise SpecError(f"parallel.{refused.reason}")
        linears(model)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassFlops:
    """FLOPs of one forward pass, by what does them."""

    linears: float = 0.0
    """Products with weights, routed experts and routers included; exactly 2 x weights x tokens."""
    attention: float = 0.0
    scan: float = 0.0
    conv: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    def __add__(self, other: PassFlops) -> PassFlops:
        return PassFlops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of an optimiser step over all ranks. Additions of norms, activations and the optimiser are not counted."""

    forward: PassFlops
    by_layer: dict[str, PassFlops]
    """The forward pass by kind of layer; `head` beside them."""
    recompute: Recompute

    @property
    def model(self) -> float:
        """Forward pass once and backward pass once, which is twice as much: what MFU counts."""
        return 3.0 * self.forward.total

    @property
    def hardware(self) -> float:
        """All that is computed: also what recompute and attention's backward kernels do once more."""
        f = self.forward
        again = {"none": 0.0, "selective": f.scan + f.conv, "full": f.total - f.head}[self.recompute]
        return self.model + again + (ATTENTION_BACKWARD - 2.0) * f.attention


def step_flops(model: ModelSpec, step: TrainingStep) -> StepFlops:
    """FLOPs of one optimiser step of `step.tokens` positions. Raises SpecError for layers that are not trained here.

    Attention is counted causally, a document at a time (4 H P a pair); the scan by chunks of `SCAN_CHUNK` tokens, as
    2 Q (G N + H P) + 4 H P N a token (Mamba-2, arXiv:2405.21060, section 6); the convolution as 2 k a channel and token.
    """
    by_layer: dict[str, PassFlops] = {}
    for mixer, count in model.mixers:
        name = type(mixer).__name__
        one = mixer_flops(mixer, model.hidden_size, step)
        by_layer[name] = by_layer.get(name, PassFlops()) + _times(one, count)
    by_layer["head"] = PassFlops(head=2.0 * step.tokens * model.hidden_size * model.vocab_size)
    return StepFlops(forward=sum(by_layer.values(), PassFlops()), by_layer=by_layer, recompute=step.recompute)


def _times(flops: PassFlops, count: int) -> PassFlops:
    return PassFlops(**{f.name: getattr(flops, f.name) * count for f in fields(flops)})


def mixer_flops(m: Mixer, h: int, step: TrainingStep) -> PassFlops:
    """FLOPs of one layer's forward pass over all tokens of a step."""
    tokens = float(step.tokens)
    products = 2.0 * tokens * sum(rows * width for _, rows, width, _ in _mixer_linears(m, h))
    match m:
        case Mamba2():
            inside = 2.0 * SCAN_CHUNK * (m.groups * m.state_dim + m.d_inner) + 4.0 * m.d_inner * m.state_dim
            return PassFlops(linears=products, scan=inside * tokens, conv=2.0 * m.conv_kernel * m.conv_width * tokens)
        case Attention():
            pairs = step.pairs(m.window) * step.sequences
            return PassFlops(linears=products, attention=4.0 * m.num_heads * m.head_dim * pairs)
        case MoE():
            matrices = 3 if m.gated else 2
            routed = m.num_experts * h + m.top_k * matrices * m.expert_width(h) * m.ffn_size
            return PassFlops(linears=products + 2.0 * tokens * routed)
        case _:
            return PassFlops(linears=products)


def flops_per_token(model: ModelSpec, sequence_length: int, document_length: int | None = None) -> float:
    """FLOPs of forward and backward pass for one position, nothing computed twice: what MFU and tokens/s are tied by."""
    step = TrainingStep(sequence_length=sequence_length, sequences=1, micro=1, document_length=document_length)
    return step_flops(model, step).model / sequence_length
