"""What a language model is, as far as its arithmetic goes: a tuple of layers, each layer ONE mixer.

A transformer block is two layers here (attention, then MLP or MoE), as in Nemotron-H, so hybrids and
transformers are counted by the same code. Every layer has one pre-norm (hidden_size weights) and one residual.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tandem.spec.errors import SpecError
from tandem.spec.mixers import (
    MIXERS,
    MLA,
    MLP,
    Attention,
    GatedDeltaNet,
    Mamba2,
    Mixer,
    MoE,
    Recurrent,
    Rope,
    SparseIndex,
)
from tandem.spec.units import itemsize, require_int, require_number

__all__ = [
    "MLA",
    "MLP",
    "Attention",
    "Family",
    "GatedDeltaNet",
    "Mamba2",
    "Mixer",
    "MoE",
    "ModelSpec",
    "Recurrent",
    "Rope",
    "SparseIndex",
]

Family = Literal["dense", "moe", "mla", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model: embeddings, layers of one mixer each, a final norm and a head.

    `native_precision` is the number format of the published weights; `omitted` names the parts of the published
    model that are not counted here (a vision encoder, multi-token-prediction heads), so that nobody is surprised.
    """

    name: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Mixer, ...]
    tied_embeddings: bool = False
    max_context: int = 131072
    norm_eps: float = 1e-5
    native_precision: str = "bf16"
    omitted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise SpecError("name='': a model needs a name")
        for field in ("vocab_size", "hidden_size", "max_context"):
            require_int(field, getattr(self, field))
        require_number("norm_eps", self.norm_eps)
        itemsize(self.native_precision)
        if not self.layers:
            raise SpecError("layers=(): a model needs at least one layer")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, tuple(MIXERS.values())):
                raise SpecError(f"layers[{i}]={layer!r}: must be one of {', '.join(MIXERS)}")

    @cached_property
    def mixers(self) -> tuple[tuple[Mixer, int], ...]:
        """Distinct mixers with the number of layers of each, in order of first appearance."""
        return tuple(Counter(self.layers).items())

    @cached_property
    def parameters(self) -> int:
        """Exact number of weights, embeddings, head and norms included."""
        h = self.hidden_size
        layers = sum(n * (m.parameters(h) + h) for m, n in self.mixers)
        return layers + self.embedding_parameters + h

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding and, unless tied, of the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @cached_property
    def active_parameters(self) -> int:
        """Weights that one token uses: all, less the routed experts it is not sent to."""
        h = self.hidden_size
        idle = sum(n * (m.num_experts - m.top_k) * m.expert_parameters(h) for m, n in self.mixers if isinstance(m, MoE))
        return self.parameters - idle

    @cached_property
    def family(self) -> Family:
        """`hybrid` with a recurrent layer, else `mla`, `moe` or `dense`: the groups that errors are told by."""
        kinds = {type(m) for m, _ in self.mixers}
        if kinds & {Mamba2, GatedDeltaNet}:
            return "hybrid"
        if MLA in kinds:
            return "mla"
        return "moe" if MoE in kinds else "dense"

    def kv_bytes(self, context: int, *, kv: str = "bf16") -> int:
        """Bytes of one sequence's attention cache after `context` tokens; a window caps its layer's share."""
        total = 0
        for m, n in self.mixers:
            if isinstance(m, Attention):
                total += n * m.kv_values_per_token() * min(context, m.window or context)
            elif isinstance(m, MLA):
                total += n * m.kv_values_per_token() * context
        return round(total * itemsize(kv))

    def kv_bytes_per_token(self, *, kv: str = "bf16") -> int:
        """Bytes that one more token adds to the cache while no window is full yet: k of `s0 + k * isl`."""
        return self.kv_bytes(1, kv=kv)

    def ssm_bytes(self, *, state: str = "fp32") -> int:
        """Bytes of one sequence's recurrent state (SSM or delta-rule matrices), constant in length."""
        values = sum(n * m.state_values()[0] for m, n in self.mixers if isinstance(m, Recurrent))
        return round(values * itemsize(state))

    def conv_bytes(self, *, activations: str = "bf16") -> int:
        """Bytes of one sequence's convolution windows, constant in length."""
        values = sum(n * m.state_values()[1] for m, n in self.mixers if isinstance(m, Recurrent))
        return round(values * itemsize(activations))

    def state_bytes_per_sequence(self, *, state: str = "fp32", activations: str = "bf16") -> int:
        """Recurrent state plus convolution windows of one sequence: s0 of `s0 + k * isl`."""
        return self.ssm_bytes(state=state) + self.conv_bytes(activations=activations)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` rebuilds an equal spec; runs of equal layers are kept apart."""
        data = {k: v for k, v in asdict(self).items() if k != "layers"}
        data["layers"] = [{"mixer": type(m).__name__, **asdict(m)} for m in self.layers]
        data["omitted"] = list(self.omitted)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Rebuild a spec that `to_json` wrote; an unknown field or mixer is a SpecError."""
        try:
            layers = tuple(_mixer(layer) for layer in data["layers"])
            rest = {k: v for k, v in data.items() if k not in ("layers", "omitted")}
            return cls(layers=layers, omitted=tuple(data.get("omitted", ())), **rest)
        except KeyError as missing:
            raise SpecError(f"{missing.args[0]}: missing from the model specification") from None
        except TypeError as wrong:
            raise SpecError(f"model specification: {str(wrong).replace('ModelSpec.__init__() ', '')}") from None

    def renamed(self, name: str) -> ModelSpec:
        """The same arithmetic under another name."""
        return replace(self, name=name)


def _mixer(layer: Any) -> Mixer:
    if not isinstance(layer, dict):
        raise SpecError(f"layers holds {layer!r}: must be an object with the mixer's name and fields")
    item = dict(layer)
    kind = item.pop("mixer")
    if kind not in tuple(MIXERS):
        raise SpecError(f"mixer={kind!r}: must be one of {', '.join(MIXERS)}")
    if item.get("index") is not None and kind == "MLA":
        item["index"] = SparseIndex(**item["index"])
    if item.get("rope") is not None and kind == "Attention":
        item["rope"] = Rope(**item["rope"])
    return MIXERS[kind](**item)
