"""The decoder in the Hugging Face world: `generate`, TRL's trainers, PEFT adapters, lm-eval and `AutoModelForCausalLM`.

Importing this module registers `model_type: tandem`. Nothing is computed here: the layers are those of a `Decoder`, and
`TandemForCausalLM.decoder` is that decoder, sharing every parameter.

TRL's DPO and GRPO load their reference model from `config.name_or_path`. For a reference that is this code, train a model
that `from_pretrained` read out of a folder which `save_pretrained` wrote; other folders give transformers' own classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from tandem.model.config_out import read_token_ids
from tandem.model.hf_cache import TandemCache
from tandem.model.hf_config import TandemConfig
from tandem.model.hf_files import Loading, read_hub_names, save_folder
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.spec.errors import SpecError

__all__ = ["TandemCache", "TandemConfig", "TandemForCausalLM", "TandemModel"]

_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""transformers 5.21 to 5.24 renamed `past_key_values`; both names are taken, this one is given."""
_NOT_BUILT = ("inputs_embeds", "output_hidden_states", "output_attentions")


class TandemPreTrainedModel(PreTrainedModel):
    """What the model and its head share: configuration, loading, and no weights of their own to initialise."""

    config: TandemConfig
    config_class = TandemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _no_split_modules = ["Layer"]  # noqa: RUF012 - as PreTrainedModel declares it
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder draws its own weights (`init.py`)."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class TandemModel(TandemPreTrainedModel):
    """Embedding, layers and final norm of a decoder: token ids to hidden states."""

    def __init__(self, config: TandemConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        if decoder is None:
            tokens = read_token_ids(config.to_dict())
            dtype, device = torch.get_default_dtype(), torch.get_default_device()
            decoder = Decoder(config.to_spec(), dtype=dtype, device=device, token_ids=tokens)
        self._held = (decoder,)  # in a tuple, so that its weights are not counted twice
        self.embeddings = decoder.backbone.embeddings
        self.layers = decoder.backbone.layers
        self.norm_f = decoder.backbone.norm_f
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def decoder(self) -> Decoder:
        """The decoder of these modules, also where PEFT or `resize_token_embeddings` put others in their place."""
        decoder = self._held[0]
        decoder.backbone.embeddings, decoder.backbone.norm_f = self.embeddings, self.norm_f
        if decoder.spec.vocab_size != self.config.vocab_size:
            decoder.spec = replace(decoder.spec, vocab_size=self.config.vocab_size)
        return decoder

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b seen"] | Bool[Tensor, "b seen"] | Float[Tensor, "b seen"] | None = None,
        position_ids: Int[Tensor, "rows t"] | None = None,
        cache: TandemCache | None = None,
        past_key_values: TandemCache | None = None,
        use_cache: bool | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, and the cache where one is kept.

        `attention_mask` has a column for every token that the cache has seen and every new one. `documents` numbers the
        documents packed into a row; without it, a row of `position_ids` that begins anew begins a document. Packed rows leave
        no cache. A cache keeps no gradients: what continues it learns as from a given past.
        """
        ids, cache = _checked(input_ids, cache, past_key_values, kwargs)
        decoder, mask = self.decoder, _new_columns(attention_mask, ids)
        if documents is None and (cache is None or not cache.columns):
            documents = documents_of(position_ids, ids, mask)
        if _caches(self, use_cache, cache, documents) and cache is None:
            cache = TandemCache.fresh(decoder, len(ids))
        state = None if cache is None else cache.take(ids.shape[1])
        if self.gradient_checkpointing and self.training:
            decoder.backbone.checkpoint = self._gradient_checkpointing_func
        try:
            hidden = decoder.hidden_states(ids, attention_mask=mask, documents=documents, state=state)
        finally:
            decoder.backbone.checkpoint = None
        kept: dict[str, Any] = {_CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=hidden, **kept)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> TandemModel:
        """As `TandemForCausalLM.from_pretrained`, without the head."""
        return TandemForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs).model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """As `TandemForCausalLM.save_pretrained`, the head of the decoder included."""
        decoder = self.decoder
        TandemForCausalLM(TandemConfig.of(decoder), decoder).save_pretrained(save_directory, **kwargs)


class TandemForCausalLM(TandemPreTrainedModel, GenerationMixin):
    """A decoder as a transformers model. Build it by `from_decoder`, `from_pretrained` or from a configuration."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: TandemConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        self.model = TandemModel(config, decoder)
        self.lm_head = self.model.decoder.lm_head
        self.register_load_state_dict_pre_hook(read_hub_names)
        self.post_init()

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> TandemForCausalLM:
        """The decoder's own modules as a transformers model: training one trains the other."""
        model = cls(TandemConfig.of(decoder), decoder)
        model.train(decoder.training)
        return model

    @property
    def decoder(self) -> Decoder:
        """The decoder, sharing every parameter, with the special tokens of the configuration."""
        decoder = self.model.decoder
        decoder.lm_head = self.lm_head
        decoder.token_ids = read_token_ids(vars(self.config))
        return decoder

    def get_decoder(self) -> TandemModel:
        """The part before the head, as transformers means it."""
        return self.model

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Another head. A plain linear layer becomes one that takes weights of fewer bits than its input."""
        if type(new_embeddings) is nn.Linear:
            head = Linear(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
            head.weight = new_embeddings.weight
            new_embeddings = head
        self.lm_head = new_embeddings

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b seen"] | Bool[Tensor, "b seen"] | Float[Tensor, "b seen"] | None = None,
        position_ids: Int[Tensor, "rows t"] | None = None,
        cache: TandemCache | None = None,
        past_key_values: TandemCache | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        documents: Int[Tensor, "b t"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, fp32, of all columns, of the last `logits_to_keep` or of those columns; the loss where there are `labels`.

        Without gradients a cache is filled by `Decoder.prefill` and `Decoder.decode`, in bounded memory and at their speed.
        Packed rows leave no cache.
        """
        ids, cache = _checked(input_ids, cache, past_key_values, kwargs)
        mask, begins = _new_columns(attention_mask, ids), cache is None or not cache.columns
        if documents is None and begins:
            documents = documents_of(position_ids, ids, mask)
        use_cache = _caches(self, False if use_cache is None and labels is not None else use_cache, cache, documents)
        simple = documents is None and isinstance(logits_to_keep, int) and logits_to_keep <= 1
        if simple and not torch.is_grad_enabled() and use_cache:
            decoder = self.decoder
            cache = TandemCache.fresh(decoder, len(ids)) if cache is None else cache
            state = cache.take(ids.shape[1])
            if ids.shape[1] == 1 and not begins and (mask is None or bool(mask.all())):
                logits = decoder.decode(ids, state)[0]
            else:
                logits = decoder.prefill(ids, state, attention_mask=mask, logits_to_keep=int(logits_to_keep))[0]
        else:
            outputs = self.model(ids, mask, cache=cache, use_cache=use_cache, documents=documents, return_dict=True)
            hidden, cache = outputs.last_hidden_state, getattr(outputs, _CACHE)
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, columns]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept: dict[str, Any] = {_CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> TandemForCausalLM:
        """The model of a folder that `save_pretrained` or `save_model` wrote, or of anything else that `load_model` reads.

        `dtype` (or `torch_dtype`) is `auto`, the stored one, by default; `device_map` names one device for the whole model.
        A folder with a PEFT adapter gives its base model with the adapter. Fields of the configuration can be set by name.
        """
        loading = Loading.of(pretrained_model_name_or_path, args, kwargs)
        model = cls.from_decoder(loading.read_decoder())
        loading.finish(model)
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write config.json (`model_type: tandem`), generation_config.json and the weights under their names on the hub.

        With adapters that were added by `add_adapter`, these alone are written, as PEFT has them.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        elif is_main_process:
            save_folder(self, Path(save_directory), state_dict, max_shard_size, kwargs)


def documents_of(
    position_ids: Int[Tensor, "rows t"] | None,
    ids: Int[Tensor, "b t"],
    mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | Float[Tensor, "b t"] | None,
) -> Int[Tensor, "b t"] | None:
    """Documents that positions tell apart: a new one where a token's position does not follow its neighbour's.

    None for one document a row, and so for positions that only skip padding.
    """
    if position_ids is None or position_ids.shape[1] < 2:
        return None
    begins = position_ids.diff(dim=1) != 1
    both = begins if mask is None else begins & mask[:, 1:].bool() & mask[:, :-1].bool()
    if not bool(both.any()):
        return None
    numbers = torch.cat([torch.zeros_like(position_ids[:, :1]), begins.cumsum(1)], 1)
    return numbers.expand_as(ids)


def _caches(
    model: TandemPreTrainedModel, use_cache: bool | None, cache: TandemCache | None, documents: Int[Tensor, "b t"] | None
) -> bool:
    """Whether a pass fills a cache: one that is given, else as asked for, else as configured. Documents have none."""
    if documents is None:
        return cache is not None or (model.config.use_cache and not model.training if use_cache is None else use_cache)
    if cache is not None or use_cache:
        raise SpecError("use_cache=True: packed documents leave no cache, which holds one document a row; leave it out")
    return False


def _new_columns(
    attention_mask: Int[Tensor, "b seen"] | Bool[Tensor, "b seen"] | Float[Tensor, "b seen"] | None, ids: Int[Tensor, "b t"]
) -> Int[Tensor, "b t"] | Bool[Tensor, "b t"] | Float[Tensor, "b t"] | None:
    """The columns of a mask that belong to the new tokens."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < ids.shape[1]:
        raise SpecError(f"attention_mask has shape {tuple(attention_mask.shape)}: must have a column for every token seen")
    return attention_mask[:, -ids.shape[1] :]


def _checked(
    input_ids: Int[Tensor, "b t"] | None, cache: object, past_key_values: object, kwargs: dict[str, Any]
) -> tuple[Int[Tensor, "b t"], TandemCache | None]:
    """Token ids and the cache under either of its names; what the decoder does not give is refused by name."""
    for name in _NOT_BUILT:
        given = kwargs.get(name)
        if isinstance(given, Tensor) or given:
            raise SpecError(f"{name}: not built; the decoder takes input_ids and gives logits or last_hidden_state")
    if input_ids is None:
        raise SpecError("input_ids=None: the decoder needs token ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        shape = f"has shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else f"is a {type(input_ids).__name__}"
        raise SpecError(f"input_ids {shape}: must be a tensor of integers [batch, time]")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, TandemCache):
        raise SpecError(f"cache is a {type(found).__name__}: must be what this model returned, a TandemCache")
    return input_ids, found


AutoConfig.register("tandem", TandemConfig, exist_ok=True)
AutoModel.register(TandemConfig, TandemModel, exist_ok=True)
AutoModelForCausalLM.register(TandemConfig, TandemForCausalLM, exist_ok=True)
