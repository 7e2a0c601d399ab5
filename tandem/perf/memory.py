"""What one GPU must hold, and the largest batch that fits: weights + attention cache + recurrent state + workspace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import LayerCosts, Layout
from tandem.perf.ops import Array, Result
from tandem.spec.design import Precision
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import itemsize, require_int
from tandem.spec.workload import MAX_TOKENS

COLLECTIVE_BYTES = 400 * 2**20
"""Buffers of the collective library once an instance spans GPUs (aiconfigurator-core 0.12.0 systems/*.yaml: 342 to 392 MiB)."""
DEFAULT_STEP_TOKENS = 2048
"""Tokens of the largest step whose activations are kept free when no chunk size is given (vLLM's max_num_batched_tokens)."""
LARGEST_STEP_TOKENS = 16384
"""A prefill pool without a chunk size is priced as if it took whole prompts at once, but keeps room for this many tokens."""


class MemoryUse(NamedTuple):
    """Bytes on the fullest GPU, for arrays of design points."""

    weight_bytes: NDArray[np.float64]
    sequence_bytes: NDArray[np.float64]
    """Attention cache and recurrent state of one sequence of this GPU's attention group."""
    workspace_bytes: NDArray[np.float64]
    usable_bytes: float

    def max_batch(self, layout: Layout) -> Result:
        """Largest number of sequences of one instance, over its attention groups; 0 or less when not even one fits."""
        spare = self.usable_bytes - self.weight_bytes - self.workspace_bytes
        return np.floor(np.maximum(spare, 0.0) / np.maximum(self.sequence_bytes, 1.0)) * layout.dp


@dataclass(frozen=True)
class ModelMemory:
    """Memory of one model at one precision, whatever the GPU."""

    model: ModelSpec
    precision: Precision

    @cached_property
    def _dense(self) -> float:
        return itemsize(LayerCosts(self.model, self.precision).dense_weights)

    def weight_bytes(self, layout: Layout) -> NDArray[np.float64]:
        """Bytes of weights on the fullest GPU; pipeline stages hold whole layers, so the longest stage counts."""
        h, bf16 = self.model.hidden_size, 2.0
        layers: Array = 0.0
        for mixer, count in self.model.mixers:
            layers = layers + count * (self._mixer_weight_bytes(mixer, layout) + h * bf16)
        num, stages = len(self.model.layers), np.asarray(layout.pp * layout.cpp)
        ends = (self.model.embedding_parameters / layout.tp + h) * bf16
        # One stage's layers, plus the embedding and the head on a single stage or half of both on an outer one.
        both = np.where(stages > 1, 0.5 if not self.model.tied_embeddings else 1.0, 1.0)
        return np.asarray(layers * np.ceil(num / stages) / num + ends * both)

    def _mixer_weight_bytes(self, mixer: Mixer, layout: Layout) -> Array:
        h, w, tp = self.model.hidden_size, self._dense, layout.tp
        all_weights = mixer.parameters(h)
        if isinstance(mixer, MoE):
            experts = mixer.num_experts * mixer.expert_parameters(h)
            routed = experts * itemsize(self.precision.weights) / (layout.ep * layout.moe_tp)
            shared = (3 if mixer.gated else 2) * h * mixer.shared_ffn_size
            latent = 2 * h * (mixer.latent_size or 0)
            router = all_weights - experts - shared - latent
            return routed + shared * w / tp + latent * w + router * 2.0
        if isinstance(mixer, Attention):
            inner = mixer.num_heads * mixer.head_dim
            split = h * (mixer.q_width + inner) / tp + h * 2 * mixer.head_dim * np.maximum(mixer.num_kv_heads / tp, 1.0)
            rest = all_weights - h * (mixer.q_width + inner + mixer.kv_width)
            return split * w + rest * 2.0
        if isinstance(mixer, MLA):
            query = (mixer.q_lora_rank or h) * mixer.num_heads * mixer.qk_head_dim
            up = mixer.kv_lora_rank * mixer.num_heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
            split = query + up + mixer.num_heads * mixer.v_head_dim * h
            return split * w / tp + (all_weights - split) * w
        if isinstance(mixer, (Mamba2, GatedDeltaNet)):
            inner = mixer.d_inner if isinstance(mixer, Mamba2) else mixer.value_width
            linear = h * (mixer.in_width + inner)
            return (linear * w + (all_weights - linear) * 2.0) / tp
        assert isinstance(mixer, MLP)
        return all_weights * w / tp

    def sequence_bytes(self, layout: Layout, context: Array) -> NDArray[np.float64]:
        """Bytes that one sequence of `context` tokens occupies on one GPU of its group (s0 + k * context, cut by tp and pp)."""
        kv, state = itemsize(self.precision.kv), itemsize(self.precision.state)
        total: Array = 0.0
        for mixer, count in self.model.mixers:
            if isinstance(mixer, Attention):
                heads = np.maximum(mixer.num_kv_heads / layout.tp, 1.0)
                reach = context if mixer.window is None else np.minimum(context, float(mixer.window))
                total = total + count * 2.0 * mixer.head_dim * kv * heads * reach
            elif isinstance(mixer, MLA):
                total = total + count * mixer.kv_values_per_token() * kv * context
            elif isinstance(mixer, (Mamba2, GatedDeltaNet)):
                recurrent, window = mixer.state_values()
                total = total + count * (recurrent * state + window * 2.0) / layout.tp
        return np.asarray(total / (layout.pp * layout.cpp))

    def workspace_bytes(self, layout: Layout, step_tokens: Array) -> NDArray[np.float64]:
        """Activations of one step of `step_tokens` tokens at its widest layer, and the collective library's buffers."""
        widest: Array = 0.0
        for mixer, _ in self.model.mixers:
            widest = np.maximum(widest, self._activation_width(mixer, layout))
        activations = 2.0 * step_tokens * (widest + 2.0 * self.model.hidden_size)
        return np.asarray(activations + COLLECTIVE_BYTES * (np.asarray(layout.gpus) > 1))

    def _activation_width(self, mixer: Mixer, layout: Layout) -> Array:
        """Numbers that a layer keeps for one token at its peak: its input projection's output and the next input."""
        if isinstance(mixer, MLP):
            return (mixer.up_width + mixer.ffn_size) / layout.tp
        if isinstance(mixer, MoE):
            gates = 3 if mixer.gated else 2
            return gates * (
                mixer.ffn_size * mixer.top_k / layout.moe_tp / layout.ep * layout.dp + mixer.shared_ffn_size / layout.tp
            )
        if isinstance(mixer, MLA):
            return mixer.num_heads * (2 * mixer.qk_head_dim + 2 * mixer.v_head_dim) / layout.tp
        if isinstance(mixer, Attention):
            return (mixer.q_width + mixer.kv_width + mixer.num_heads * mixer.head_dim) / layout.tp
        inner = mixer.d_inner if isinstance(mixer, Mamba2) else mixer.value_width
        return (mixer.in_width + inner) / layout.tp


@dataclass(frozen=True)
class MemoryModel(ModelMemory):
    """Memory of one model at one precision on one kind of GPU."""

    hardware: HardwareSpec

    def use(self, layout: Layout, context: Array, step_tokens: Array = DEFAULT_STEP_TOKENS) -> MemoryUse:
        """Memory of every design point when sequences grow to `context` tokens and steps take `step_tokens` tokens."""
        return MemoryUse(
            weight_bytes=self.weight_bytes(layout),
            sequence_bytes=self.sequence_bytes(layout, context),
            workspace_bytes=self.workspace_bytes(layout, step_tokens),
            usable_bytes=float(self.hardware.usable_memory_bytes),
        )


def total_weight_bytes(model: ModelSpec, precision: Precision) -> int:
    """Bytes of all weights; exactly 2 bytes a parameter in bf16."""
    return round(float(ModelMemory(model, precision).weight_bytes(Layout(1.0, 1.0, 1.0, 1.0, 1.0))))


def inspect_model(spec: ModelSpec, *, context: int, batch: int, dtype: str = "bf16") -> dict[str, Any]:
    """Parameters and bytes of a model with `batch` sequences of `context` tokens on one GPU that is large enough.

    Exactly weights + attention cache + recurrent state, without workspace: the arithmetic of paper A section 4.1.
    """
    require_int("context", context, high=MAX_TOKENS)
    require_int("batch", batch, high=10**6)
    precision = Precision.parse(dtype, native=spec.native_precision)
    weight_bytes = total_weight_bytes(spec, precision)
    kv_bytes = batch * spec.kv_bytes(context, kv=precision.kv)
    each = spec.state_bytes_per_sequence(state=precision.state)
    layers: dict[str, dict[str, int]] = {}
    for mixer, count in spec.mixers:
        row = layers.setdefault(type(mixer).__name__, {"count": 0, "parameters": 0})
        row["count"] += count
        row["parameters"] += count * (mixer.parameters(spec.hidden_size) + spec.hidden_size)
    return {
        "model": spec.name,
        "context": context,
        "batch": batch,
        "dtype": str(precision),
        "parameters": spec.parameters,
        "active_parameters": spec.active_parameters,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "kv_bytes_per_token": spec.kv_bytes_per_token(kv=precision.kv),
        "state_bytes": batch * each,
        "state_bytes_per_sequence": each,
        "total_bytes": weight_bytes + kv_bytes + batch * each,
        "layers": layers,
        "omitted": list(spec.omitted),
        "max_context": spec.max_context,
    }
