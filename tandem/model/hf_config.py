"""Configuration of the Hugging Face adapter: a `ModelSpec` as a JSON object, and the fields that its libraries ask for."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from tandem.model.config_out import token_fields
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec


class TandemConfig(PreTrainedConfig):
    """`model_type: tandem`: the specification of a model, its special tokens, and whether `generate` keeps a state.

    Everything else that transformers, TRL, PEFT and lm-eval read (`hidden_size`, `num_attention_heads` ...) is looked up in
    the specification, so a config.json says nothing twice.
    """

    __no_type_check__ = True  # transformers gives this dataclass an __init__ that takes more than its fields
    model_type = "tandem"
    auto_map: ClassVar[dict[str, str]] = {}
    """Empty: this is no code of the hub; TRL reads it when it loads a reference model."""
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    spec: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    @classmethod
    def of(cls, decoder: Decoder) -> TandemConfig:
        """The configuration of a decoder."""
        dtype = decoder.backbone.embeddings.weight.dtype
        config: TandemConfig = cls(spec=decoder.spec.to_json(), dtype=dtype, **token_fields(decoder.token_ids))
        config.name_or_path = "" if decoder.source is None else str(decoder.source)
        return config

    def to_spec(self) -> ModelSpec:
        """The specification. Raises SpecError where there is none or where it is damaged."""
        return ModelSpec.from_json(self._stated)

    @property
    def _stated(self) -> dict[str, Any]:
        if self.spec is None:
            raise SpecError("spec=None: TandemConfig needs the JSON object of a ModelSpec, as ModelSpec.to_json gives it")
        return self.spec

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary. Setting it is for `resize_token_embeddings`."""
        return int(self._stated["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.spec = {**self._stated, "vocab_size": int(value)}

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self._stated["hidden_size"])

    @property
    def num_hidden_layers(self) -> int:
        """Layers of one mixer each: a Llama block counts as two."""
        return len(self._stated["layers"])

    @property
    def max_position_embeddings(self) -> int:
        """Longest context, in tokens."""
        return int(self._stated["max_context"])

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self._stated["tied_embeddings"])

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first attention layer; without one, heads of the first Mamba layer."""
        return self._first("num_heads", "Attention", "Mamba2")

    @property
    def num_key_value_heads(self) -> int:
        """Key heads of the first attention layer; without one, as `num_attention_heads`."""
        return self._first("num_kv_heads", "Attention", otherwise=self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head of the first attention layer; without one, of the first Mamba layer."""
        return self._first("head_dim", "Attention", "Mamba2")

    @property
    def intermediate_size(self) -> int:
        """Inner width of the first MLP or expert."""
        return self._first("ffn_size", "MLP", "MoE", otherwise=0)

    def _first(self, field: str, *kinds: str, otherwise: int = 1) -> int:
        layers = self._stated["layers"]
        found = (layer[field] for kind in kinds for layer in layers if layer["mixer"] == kind)
        return int(next(found, otherwise))
