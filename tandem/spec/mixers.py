"""The mixers that a layer can hold, and the exact number of weights, cached numbers and state numbers of each.

Letters used in formulas: h hidden size, d_inner = num_heads * head_dim of a Mamba layer, G groups, N state_dim, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

FREE = {"free": True}
"""Marks a field that changes what a layer computes but not what that costs."""


def _positive(spec: object, *names: str) -> None:
    for name in names:
        require_int(name, getattr(spec, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding of the first `fraction` of each head; its cost does not depend on these numbers.

    `scaling` names how the frequencies are stretched. The decoder computes `none`, `linear` and `llama3` (transformers'
    `rope_utils`); other kinds are kept by name, so that a plan can be made for a model that the decoder refuses.
    """

    theta: float
    fraction: float = 1.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int | None = None
    """llama3: the context of training, in tokens."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            require_number(name, getattr(self, name))
        require_number("fraction", self.fraction, high=1.0)
        if self.scaling == "llama3" and self.original_max_context is None:
            raise SpecError("original_max_context=None: needed where scaling is 'llama3'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Grouped-query attention. `window` is the number of most recent tokens that a token sees, None for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None = field(default=None, metadata=FREE)
    """None: no position embedding, as in Nemotron-H."""
    window: int | None = None
    chunked_window: bool = False
    """Llama 4: attention within fixed chunks of `window` tokens instead of a sliding window."""
    qk_norm: Literal["none", "head", "full", "unweighted"] = "none"
    """Learned RMS norm of queries and keys: per head, over all heads at once, or without weights."""
    qkv_bias: bool = False
    out_bias: bool = False
    output_gate: bool = False
    """Qwen3-Next and Qwen3.5: the query projection is doubled, its second half gates the output."""
    sinks: bool = False
    """gpt-oss: one learned logit a head."""

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if self.window is not None:
            _positive(self, "window")

    @property
    def q_width(self) -> int:
        """Width of the query projection, its output gate included."""
        return self.num_heads * self.head_dim * (2 if self.output_gate else 1)

    @property
    def kv_width(self) -> int:
        """Width of keys plus values."""
        return 2 * self.num_kv_heads * self.head_dim

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm (Llama, Qwen3, gpt-oss, Nemotron-H alike)."""
        inner = self.num_heads * self.head_dim
        norm = {
            "none": 0,
            "unweighted": 0,
            "head": 2 * self.head_dim,
            "full": inner + self.num_kv_heads * self.head_dim,
        }[self.qk_norm]
        bias = (self.q_width + self.kv_width) * self.qkv_bias + h * self.out_bias
        return h * (self.q_width + self.kv_width) + inner * h + norm + bias + self.num_heads * self.sinks

    def kv_values_per_token(self) -> int:
        """Cached numbers of one token: a key and a value for every KV head."""
        return self.kv_width


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseIndex:
    """DeepSeek sparse attention: a light indexer picks the `top_k` tokens that attention reads."""

    num_heads: int
    head_dim: int
    top_k: int

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "head_dim", "top_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2/V3): the cache holds one latent and one rotary key a token."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index: SparseIndex | None = None

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _positive(self, "q_lora_rank")

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm (transformers' deepseek_v3, glm_moe_dsa)."""
        q = self.num_heads * self.qk_head_dim
        query = h * q if self.q_lora_rank is None else h * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * q
        down = h * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        out = self.num_heads * self.v_head_dim * h
        index = 0
        if self.index is not None:
            i = self.index
            index = (self.q_lora_rank or h) * i.num_heads * i.head_dim + h * i.head_dim + 2 * i.head_dim + h * i.num_heads
        return query + down + up + out + index

    def kv_values_per_token(self) -> int:
        """Cached numbers of one token: latent, rotary key and, with sparse attention, the indexer's key."""
        return self.kv_lora_rank + self.qk_rope_head_dim + (self.index.head_dim if self.index else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2:
    """Mamba-2 mixer as in Nemotron-H (paper A section 1.2). d_inner is num_heads * head_dim, never expand * h."""

    num_heads: int
    head_dim: int
    state_dim: int
    groups: int
    conv_kernel: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_min: float = field(default=0.0, metadata=FREE)
    dt_max: float | None = field(default=None, metadata=FREE)
    """Clamp of the step size after softplus; by default none, as in Megatron-LM."""

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "head_dim", "state_dim", "groups", "conv_kernel")
        if self.dt_max is not None and not 0 <= self.dt_min < self.dt_max:
            raise SpecError(f"dt_max={self.dt_max!r}: must be above dt_min={self.dt_min!r}, or None")
        if self.num_heads % self.groups:
            raise SpecError(f"groups={self.groups}: must divide num_heads={self.num_heads}")

    @property
    def d_inner(self) -> int:
        """Width of x and of z."""
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the causal convolution: x, B and C together."""
        return self.d_inner + 2 * self.groups * self.state_dim

    @property
    def in_width(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_width + self.num_heads

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm; A_log, D and dt_bias have one value a head."""
        conv = self.conv_width * (self.conv_kernel + self.conv_bias)
        bias = (self.in_width + h) * self.proj_bias
        return h * self.in_width + conv + 3 * self.num_heads + self.d_inner + self.d_inner * h + bias

    def state_values(self) -> tuple[int, int]:
        """Numbers of one sequence's (SSM state, convolution window); the window keeps conv_kernel - 1 inputs."""
        return self.num_heads * self.head_dim * self.state_dim, self.conv_width * (self.conv_kernel - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaNet:
    """Gated DeltaNet linear attention (Qwen3-Next, Qwen3.5): one matrix state a value head."""

    num_key_heads: int
    key_head_dim: int
    num_value_heads: int
    value_head_dim: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        _positive(self, "num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim", "conv_kernel")
        if self.num_value_heads % self.num_key_heads:
            raise SpecError(f"num_key_heads={self.num_key_heads}: must divide num_value_heads={self.num_value_heads}")

    @property
    def key_width(self) -> int:
        """Width of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Width of all values (and of the output gate z)."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the causal convolution: queries, keys and values together."""
        return 2 * self.key_width + self.value_width

    @property
    def in_width(self) -> int:
        """Rows of the input projections: q, k, v, z, and the two scalars beta and alpha of every value head."""
        return self.conv_width + self.value_width + 2 * self.num_value_heads

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm (transformers' qwen3_5)."""
        small = self.conv_width * self.conv_kernel + 2 * self.num_value_heads + self.value_head_dim
        return h * self.in_width + small + self.value_width * h

    def state_values(self) -> tuple[int, int]:
        """Numbers of one sequence's (matrix state, convolution window)."""
        return (
            self.num_value_heads * self.key_head_dim * self.value_head_dim,
            self.conv_width * (self.conv_kernel - 1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MLP:
    """Feed-forward layer; gated (SwiGLU, three matrices) or not (squared ReLU, two)."""

    ffn_size: int
    gated: bool
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self, "ffn_size")

    @property
    def up_width(self) -> int:
        """Rows of the first matrix, gate included."""
        return self.ffn_size * (2 if self.gated else 1)

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm."""
        return h * self.up_width + self.ffn_size * h + (self.up_width + h) * self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class MoE:
    """Mixture of experts: `top_k` of `num_experts` routed experts a token, plus an always-on shared expert."""

    num_experts: int
    top_k: int
    ffn_size: int
    gated: bool
    shared_ffn_size: int = 0
    latent_size: int | None = None
    """LatentMoE (Nemotron-3 Super, Ultra): routed experts work on a down-projected hidden state of this width."""
    bias: bool = False
    router_bias: bool = False
    """A bias (or score correction) for every expert in the router."""
    shared_gate: bool = False
    """Qwen3.5: a sigmoid gate, h weights, scales the shared expert."""
    score: Literal["softmax", "sigmoid"] = field(default="softmax", metadata=FREE)
    """How the router turns its logits into scores; with `sigmoid`, experts are chosen by score plus correction."""
    normalise: bool = field(default=True, metadata=FREE)
    """Whether the scores of the chosen experts are made to add up to one."""
    score_scale: float = field(default=1.0, metadata=FREE)
    groups: int = field(default=1, metadata=FREE)
    """The experts form groups, of which the `top_groups` with the best two scores are kept."""
    top_groups: int = field(default=1, metadata=FREE)

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "top_k", "ffn_size")
        if self.top_k > self.num_experts:
            raise SpecError(f"top_k={self.top_k}: must be at most num_experts={self.num_experts}")
        require_int("shared_ffn_size", self.shared_ffn_size, low=0)
        if self.latent_size is not None:
            _positive(self, "latent_size")
        _positive(self, "groups", "top_groups")
        if self.num_experts % self.groups:
            raise SpecError(f"groups={self.groups}: must divide num_experts={self.num_experts}")
        if self.top_groups > self.groups:
            raise SpecError(f"top_groups={self.top_groups}: must be at most groups={self.groups}")
        require_number("score_scale", self.score_scale)

    def expert_width(self, h: int) -> int:
        """Width that the routed experts read and write."""
        return self.latent_size or h

    def expert_parameters(self, h: int) -> int:
        """Weights of one routed expert."""
        return MLP(ffn_size=self.ffn_size, gated=self.gated, bias=self.bias).parameters(self.expert_width(h))

    def always_on_parameters(self, h: int) -> int:
        """Weights that every token uses: router, shared expert, latent projections."""
        router = h * self.num_experts + self.num_experts * self.router_bias
        shared = (3 if self.gated else 2) * h * self.shared_ffn_size + h * self.shared_gate
        latent = 2 * h * self.latent_size if self.latent_size else 0
        return router + shared + latent

    def parameters(self, h: int) -> int:
        """Weights of one layer without its pre-norm."""
        return self.always_on_parameters(h) + self.num_experts * self.expert_parameters(h)


Mixer: TypeAlias = Attention | MLA | Mamba2 | GatedDeltaNet | MLP | MoE
Recurrent: TypeAlias = Mamba2 | GatedDeltaNet
MIXERS: dict[str, type[Mixer]] = {c.__name__: c for c in (Attention, MLA, Mamba2, GatedDeltaNet, MLP, MoE)}
"""Every kind of mixer by its name."""


def cost_text(mixer: Mixer) -> str:
    """The mixer as text, without the fields that cost nothing: equal for layers that cost the same."""
    named = (f"{f.name}={getattr(mixer, f.name)!r}" for f in fields(mixer) if not f.metadata.get("free"))
    return f"{type(mixer).__name__}({', '.join(named)})"
