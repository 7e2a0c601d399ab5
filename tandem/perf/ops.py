"""FLOPs and bytes of one GPU's share of each kind of operation.

Every function returns a `Work`: floating-point operations and bytes moved, for arrays that broadcast. The same
functions price a model (`costs`) and read the measured operator tables (`calibrate_ops`), so that an efficiency fitted
there means the same thing here. Sizes are per GPU, after tensor or expert parallelism has divided them.

Letters: m, n, k matmul sizes; w, a bytes of one weight or activation; bf16 outputs take 2 bytes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]] | float
"""An array of design points, or one float; all functions broadcast."""

Result: TypeAlias = NDArray[np.float64] | float
"""What is computed from an `Array`: numpy makes a scalar, np.float64, of a result without axes."""

Count: TypeAlias = Array | NDArray[np.integer[Any]]
"""Sizes as floats or, as tables list them, as whole numbers."""

OpClass = Literal[
    "gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode", "moe", "scan_prefill", "scan_decode",
    "conv_prefill", "conv_decode", "memory", "allreduce", "alltoall", "send",
]  # fmt: skip
OP_CLASSES: tuple[OpClass, ...] = get_args(OpClass)
NETWORK: frozenset[str] = frozenset({"allreduce", "alltoall", "send"})

OUT = 2.0
"""Bytes of one bf16 result."""


class Work(NamedTuple):
    """Floating-point operations and bytes moved by one GPU; for NETWORK classes, bytes it sends over the link."""

    flops: Any
    moved_bytes: Any


def gemm(m: Count, n: Count, k: Count, w: float, a: float) -> Work:
    """Dense matmul [m, k] x [k, n] with weights of `w` and inputs of `a` bytes."""
    return Work(2.0 * m * n * k, n * k * w + m * (k * a + n * OUT))


def attended_pairs(new: Array, prior: Array, window: int | None = None) -> Array:
    """Query-key pairs of `new` causal tokens after `prior` cached ones: each sees itself and what came before.

    With a window w a token at position p sees min(p + 1, w) tokens. Continuous in its arguments, exact for integers.
    """
    total: Array = new * prior + new * (new + 1) / 2
    if window is None:
        return total
    # Tokens beyond the window would see (position + 1 - window) too many; sum that triangle over [prior, prior + new).
    last = np.maximum(prior + new - window, 0.0)
    first = np.maximum(prior - window, 0.0)
    unseen: Array = last * (last + 1) / 2 - first * (first + 1) / 2
    return total - unseen


def attention_prefill(
    seqs: Array, new: Array, prior: Array, heads: Array, kv_heads: Array, head_dim: int, kv: float, window: int | None = None
) -> Work:
    """Causal attention of `new` tokens of each of `seqs` sequences after `prior` cached tokens."""
    pairs = attended_pairs(new, prior, window)
    reach = prior if window is None else np.minimum(prior, window)
    return attention_over(seqs, pairs, new, new + reach, heads, kv_heads, head_dim, kv)


def attention_over(
    seqs: Array, pairs: Array, queries: Array, keys: Array, heads: Array, kv_heads: Array, head_dim: int, kv: float
) -> Work:
    """Attention of each of `seqs` sequences over `pairs` query-key pairs, with `queries` rows and `keys` cached rows read."""
    moved = 2.0 * OUT * heads * head_dim * queries + 2.0 * kv * kv_heads * head_dim * keys
    return Work(4.0 * seqs * heads * head_dim * pairs, seqs * moved)


def attention_decode(
    seqs: Array, context: Array, heads: Array, kv_heads: Array, head_dim: int, kv: float, queries: Array = 1.0
) -> Work:
    """`queries` tokens of each of `seqs` sequences attend to `context` cached tokens (already capped by a window)."""
    flops = 4.0 * seqs * queries * heads * head_dim * context
    moved = seqs * (2.0 * OUT * queries * heads * head_dim + 2.0 * kv * kv_heads * head_dim * context)
    return Work(flops, moved)


def mla_prefill(seqs: Array, new: Array, prior: Array, heads: Array, qk_head_dim: int, v_head_dim: int) -> Work:
    """Causal attention on up-projected keys and values (multi-head latent attention, prefill)."""
    pairs = attended_pairs(new, prior)
    moved = seqs * heads * OUT * (qk_head_dim + v_head_dim) * (2.0 * new + prior)
    return Work(2.0 * seqs * heads * (qk_head_dim + v_head_dim) * pairs, moved)


def mla_decode(seqs: Array, context: Array, heads: Array, latent: int, rope: int, kv: float, queries: Array = 1.0) -> Work:
    """`queries` tokens a sequence attend in the latent space (absorbed projections): every head reads the same latent."""
    flops = 2.0 * seqs * queries * heads * (2 * latent + rope) * context
    moved = seqs * (kv * (latent + rope) * context + OUT * queries * heads * (2 * latent + rope))
    return Work(flops, moved)


def touched_experts(tokens: Array, experts: Array, top_k: Array, num_experts: int) -> Array:
    """Expected number of this GPU's `experts` that at least one of `tokens` tokens picks: E (1 - (1 - k/E)^tokens)."""
    miss = np.log1p(-np.minimum(top_k / num_experts, 1.0 - 1e-12))
    return -experts * np.expm1(tokens * miss)


def distinct_groups(top_k: Array, groups: Array) -> Array:
    """Expected number of expert groups that a token's `top_k` picks fall into: a group gets one copy, however many it holds."""
    return groups * (1.0 - (1.0 - 1.0 / groups) ** top_k)


def moe(tokens: Array, h: int, ffn: Array, top_k: int, num_experts: int, ep: Array, w: float, a: float, *, gated: bool) -> Work:
    """Routed experts of one of `ep` expert groups; `ffn` is the expert's width after slicing, `tokens` those of all groups."""
    matrices = 3.0 if gated else 2.0
    routed = tokens * top_k / ep
    weights = touched_experts(tokens, num_experts / ep, top_k, num_experts) * matrices * h * ffn * w
    return Work(2.0 * matrices * routed * h * ffn, weights + routed * (h * (a + OUT) + matrices * ffn * OUT))


def scan_prefill(
    tokens: Array, seqs: Array, heads: Array, head_dim: int, state_dim: int, groups: Array, chunk: int = 128
) -> Work:
    """Chunked recurrence (Mamba-2's state-space duality, gated delta rule): scores and outputs inside a chunk, state across.

    A chunk of Q tokens costs Q^2 (G N + H P) for scores and outputs and 4 Q H P N for entering and leaving the state.
    """
    inside = 2.0 * chunk * (groups * state_dim + heads * head_dim) * tokens
    across = 4.0 * heads * head_dim * state_dim * tokens
    inputs = OUT * tokens * (3.0 * heads * head_dim + 2.0 * groups * state_dim)
    states = 3.0 * 4.0 * heads * head_dim * state_dim * (tokens / chunk + seqs)
    return Work(inside + across, inputs + states)


def scan_decode(
    seqs: Array, heads: Array, head_dim: int, state_dim: int, groups: Array, state: float, tokens: Array = 1.0
) -> Work:
    """`tokens` recurrent steps a sequence: the whole state, `state` bytes a number, is read once and written after each token,
    since any of a draft's tokens may turn out to be the last one that holds."""
    size = heads * head_dim * state_dim
    moved = seqs * ((1.0 + tokens) * state * size + tokens * OUT * (3.0 * heads * head_dim + 2.0 * groups * state_dim))
    return Work(6.0 * seqs * tokens * size, moved)


def conv(tokens: Array, channels: Array, kernel: int) -> Work:
    """Depthwise causal convolution of `tokens` tokens: read, write, and in decode also the window of kernel - 1 inputs."""
    return Work(2.0 * kernel * tokens * channels, 2.0 * OUT * tokens * channels)


def conv_update(seqs: Array, channels: Array, kernel: int) -> Work:
    """One step of the convolution a sequence: the window is shifted in place."""
    return Work(2.0 * kernel * seqs * channels, OUT * seqs * channels * (2.0 * kernel))


def memory(moved_bytes: Array) -> Work:
    """An elementwise pass: norms, residuals, activations, rotary embedding, sampling."""
    return Work(0.0 * moved_bytes, moved_bytes)


def allreduce(message_bytes: Array, gpus: Array) -> Work:
    """Ring or switch all-reduce: each GPU sends 2 (n-1)/n of the message."""
    return Work(0.0 * message_bytes, 2.0 * (gpus - 1) / gpus * message_bytes)


def alltoall(message_bytes: Array, gpus: Array) -> Work:
    """All-to-all of `message_bytes` held by each GPU: all but its own n-th part leaves."""
    return Work(0.0 * message_bytes, (gpus - 1) / gpus * message_bytes)


def send(message_bytes: Array) -> Work:
    """Point-to-point: a pipeline boundary or a state transfer."""
    return Work(0.0 * message_bytes, message_bytes)
