"""Which parallelism a model can be cut into."""

from __future__ import annotations

from tandem.spec.design import Parallelism
from tandem.spec.errors import Infeasible
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, ModelSpec, MoE


def refuse_parallelism(model: ModelSpec, p: Parallelism) -> Infeasible | None:
    """Why a model cannot be spread like this, or None when it can."""
    axis, stages = ("cpp", p.cpp) if p.cpp > 1 else ("pp", p.pp)
    if stages > len(model.layers):
        return Infeasible(f"{axis}={stages}: the model has only {len(model.layers)} layers")
    if p.dp > 1 and not any(isinstance(m, MoE) for m, _ in model.mixers):
        return Infeasible(f"dp={p.dp}: attention data parallelism shares experts, and the model has none; use more replicas")
    if p.ep > 1 and not any(isinstance(m, MoE) for m, _ in model.mixers):
        return Infeasible(f"ep={p.ep}: the model has no experts")
    for mixer, _ in model.mixers:
        for field, size, ways in _divisions(mixer, p):
            if size % ways:
                axis = {"num_experts": "ep", "moe_ffn_size": "moe_tp=tp*dp/ep"}.get(field, "tp")
                return Infeasible(f"{axis}={ways}: does not divide {field}={size}")
    return None


def _divisions(mixer: object, p: Parallelism) -> list[tuple[str, int, int]]:
    """(what, its size, ways it is cut) for one mixer; KV heads are copied once tp exceeds them."""
    if isinstance(mixer, Attention):
        copied = p.tp % mixer.num_kv_heads == 0
        kv = [] if copied else [("num_kv_heads", mixer.num_kv_heads, p.tp)]
        return [("num_heads", mixer.num_heads, p.tp), *kv]
    if isinstance(mixer, MLA):
        return [("num_heads", mixer.num_heads, p.tp)]
    if isinstance(mixer, Mamba2):
        groups = [("groups", mixer.groups, p.tp)] if mixer.groups > 1 else []
        return [("mamba_num_heads", mixer.num_heads, p.tp), *groups]
    if isinstance(mixer, GatedDeltaNet):
        return [("linear_num_key_heads", mixer.num_key_heads, p.tp)]
    if isinstance(mixer, MLP):
        return [("ffn_size", mixer.ffn_size, p.tp)]
    assert isinstance(mixer, MoE)
    return [("num_experts", mixer.num_experts, p.ep), ("moe_ffn_size", mixer.ffn_size, p.moe_tp)]
