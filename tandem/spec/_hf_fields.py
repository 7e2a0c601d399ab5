"""Reading a config.json field by field: every field is checked when it is read, and none may be left over.

A `Fields` object remembers what was read. `finish` then refuses whatever is left that is neither empty nor known not to
change the arithmetic, so that a new feature of an architecture is an error and not a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number


def field_names(text: str) -> frozenset[str]:
    """The names in a text that lists them between blanks."""
    return frozenset(text.split())


# Fields of any configuration that leave the arithmetic as it is: tokens, training, generation, rotary embedding (whose
# cost does not depend on its settings), norm epsilons, number formats of a load that is not quantised, bookkeeping.
COSMETIC = field_names(
    """
    _attn_implementation _name_or_path architectures auto_map dtype model_type name_or_path torch_dtype torchscript
    transformers_version use_bfloat16
    attention_dropout classifier_dropout embd_pdrop ffn_dropout hidden_dropout initializer_range resid_pdrop
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id tokenizer_class
    finetuning_task id2label label2id problem_type task_specific_params tf_legacy_loss
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix remove_invalid_values repetition_penalty
    suppress_tokens temperature top_k top_p typical_p
    chunk_size_feed_forward num_logits_to_keep output_attentions output_hidden_states output_scores
    return_dict return_dict_in_generate use_cache
    layer_norm_epsilon norm_eps rms_norm_eps
    partial_rotary_factor rope_interleave rope_parameters rope_scaling rope_theta rotary_dim
    aux_loss_alpha output_router_logits router_aux_loss_coef router_jitter_noise seq_aux
    ep_size pretraining_tp
    """
)

# How a router scores and scales its experts: a few operations a token, whatever the choice.
ROUTING = field_names("n_group norm_topk_prob routed_scaling_factor scoring_func topk_group topk_method")


class Fields:
    """A configuration under reading. Errors are SpecErrors that name the field and the value."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._read: set[str] = set()
        kind = self.get("model_type")
        if not isinstance(kind, str):
            raise SpecError(f"model_type={kind!r}: a config.json needs a model_type in text")
        self.model_type = kind

    def get(self, name: str) -> Any:
        """The value as it stands, None where there is none."""
        self._read.add(name)
        return self._data.get(name)

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Name and value of the first spelling that is present; two spellings must not contradict each other."""
        present = [(name, self.get(name)) for name in names if self.get(name) is not None]
        if not present:
            return names[0], None
        for name, value in present[1:]:
            if value != present[0][1]:
                raise SpecError(f"{name}={value!r}: contradicts {present[0][0]}={present[0][1]!r}")
        return present[0]

    def size(self, *names: str, low: int = 1) -> int:
        """A whole number that must be there, under any of its `names`."""
        name, value = self._first(names)
        if value is None:
            raise SpecError(f"{' or '.join(names)}: missing from the configuration (model_type {self.model_type})")
        return require_int(name, value, low=low)

    def optional_size(self, *names: str, low: int = 1) -> int | None:
        """A whole number, or None where the field is absent or null."""
        name, value = self._first(names)
        return None if value is None else require_int(name, value, low=low)

    def number(self, *names: str, default: float) -> float:
        """A number above zero; `default` where it is absent or null."""
        name, value = self._first(names)
        return default if value is None else require_number(name, value)

    def limits(self, *names: str) -> tuple[float, float | None]:
        """A lower and an upper bound, None where the upper is infinite (transformers 5 writes {"__float__": "Infinity"})."""
        name, value = self._first(names)
        if value is None:
            return 0.0, None
        stated: list[Any] = value if isinstance(value, list) else []
        bounds = [item.get("__float__", item) if isinstance(item, dict) else item for item in stated]
        try:
            low, high = (float(bound) for bound in bounds)
        except (TypeError, ValueError):
            raise SpecError(f"{name}={value!r}: must be a list of two numbers") from None
        return low, None if high == math.inf else high

    def flag(self, *names: str, default: bool = False) -> bool:
        """A boolean; `default` where it is absent or null."""
        name, value = self._first(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SpecError(f"{name}={value!r}: must be true or false")
        return value

    def require(self, name: str, *allowed: object) -> None:
        """Refuse every value of a field but the `allowed` ones; a field that is absent or null passes."""
        value = self.get(name)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            choices = " or ".join(repr(a) for a in allowed)
            raise SpecError(f"{name}={value!r}: only {choices} is modelled (model_type {self.model_type})")

    def words(self, name: str, allowed: Collection[str]) -> list[str] | None:
        """A list of words, each one of `allowed`, or None where the field is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise SpecError(f"{name}={value!r}: must be a list of {', '.join(allowed)}")
        for word in value:
            if word not in tuple(allowed):
                raise SpecError(f"{name} holds {word!r}: must be one of {', '.join(allowed)}")
        return value

    def indices(self, name: str) -> list[int] | None:
        """A list of whole numbers from 0, or None where the field is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise SpecError(f"{name}={value!r}: must be a list of whole numbers")
        return [require_int(name, item, low=0) for item in value]

    def finish(self, ignored: Collection[str]) -> None:
        """Refuse a field that was not read, is not empty, and is not known to leave the arithmetic alone."""
        for name, value in self._data.items():
            empty = value is None or value is False or value in ("", [], {})
            if not (empty or name in self._read or name in COSMETIC or name in ignored):
                text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
                raise SpecError(
                    f"{name}={text}: unknown for model_type {self.model_type}, and it might change the arithmetic; "
                    "remove it if it does not"
                )


def check_length(name: str, items: Collection[object], layers: int) -> None:
    """Refuse a per-layer list whose length is not the number of layers."""
    if len(items) != layers:
        raise SpecError(f"{name} has {len(items)} entries: must have one for each of {layers} layers")
