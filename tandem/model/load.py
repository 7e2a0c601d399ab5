"""`load_model` and `save_model`: a decoder from a checkpoint folder, a GGUF file or a name, and back into a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tandem.model.checkpoint import Filling, fill, new_folder, placed_tensors, write_weights
from tandem.model.config_out import read_token_ids, token_fields, write_config
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.inputs import known_device
from tandem.model.naming import check_format
from tandem.model.native.int8 import quantise
from tandem.model.tokenizer import copy_tokenizer
from tandem.spec.catalog import find_weights, load_spec, read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.gguf import gguf_config, read_gguf_spec, read_header
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int

_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES["int8"] = torch.float16  # and then layer by layer to int8
_GENERATION = "generation_config.json"
DEFAULT_SHARD_BYTES = 5 * 10**9


def load_model(
    name_or_path: str | Path, *, dtype: str | torch.dtype = "float32", device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a checkpoint folder (nemotron_h, llama, qwen3 or our own), a GGUF file or a packaged model's name.

    `dtype` is that of the weights in memory: float32, float16, bfloat16 (or torch's own), `auto` for the stored one, or int8
    for linear layers of 8 bits beside 16-bit rest (`native.quantise`: faster, less exact, inference only). They are read
    tensor by tensor, so memory holds them once, plus a few MiB. Raises SpecError for a name without weights, for
    tensors that are missing, surplus or misshapen, and for an architecture that the decoder does not compute.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise SpecError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    device = known_device(device)
    path = find_weights(name_or_path)
    model = _load_gguf(path, dtype, device) if path.is_file() else _load_folder(path, dtype, device)
    if dtype == "int8":
        quantise(model)
    return model


def _load_folder(folder: Path, dtype: str, device: torch.device | str) -> Decoder:
    spec, config = load_spec(folder), read_json(folder / "config.json")
    form = check_format(config.get("model_type"))
    model = Decoder(spec, device="meta", token_ids=token_ids_in(folder))
    fill(Filling(model, _DTYPES[dtype], device), placed_tensors(spec, form, folder))
    return _finish(model, folder)


def _load_gguf(file: Path, dtype: str, device: torch.device | str) -> Decoder:
    from tandem.model.gguf import read_gguf_weights

    header = read_header(file)
    spec = read_gguf_spec(header, name=file.stem)
    model = Decoder(spec, device="meta", token_ids=read_token_ids(gguf_config(header)))
    read_gguf_weights(Filling(model, _DTYPES[dtype], device), spec, header)
    return _finish(model, file)


def _finish(model: Decoder, source: Path) -> Decoder:
    if model.spec.tied_embeddings:
        model.lm_head.weight = model.backbone.embeddings.weight
    model.source = source
    return model.eval()


def renamed(model: Decoder, *, name: str | None = None, context: int = 1) -> Decoder:
    """The same weights (not copied) under another name, for contexts of at least so many tokens."""
    spec = replace(model.spec, name=name or model.spec.name, max_context=max(model.spec.max_context, context))
    other = Decoder(spec, device="meta", token_ids=model.token_ids)
    other.load_state_dict(model.state_dict(), assign=True)
    other.source = model.source
    return other


def save_model(model: Decoder, folder: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write a decoder in Hugging Face layout: config.json, weights, generation_config.json and the tokenizer, where known.

    The format is nemotron_h, llama or qwen3 where one of them can say the model, and transformers then reads the same
    tensors to the bit; else our own. Weights keep their dtype, in shards beyond `max_shard_bytes`. A folder never holds
    half of a checkpoint: see `checkpoint.new_folder`.
    """
    require_int("max_shard_bytes", max_shard_bytes, high=10**15)
    dtype = model.backbone.embeddings.weight.dtype
    with new_checkpoint(Path(folder), model.spec, model.token_ids, dtype=dtype, source=model.source) as draft:
        write_weights(model, model.spec, draft, max_shard_bytes)


@contextmanager
def new_checkpoint(
    folder: Path, spec: ModelSpec, token_ids: TokenIds, *, dtype: torch.dtype, source: Path | None
) -> Iterator[Path]:
    """A folder to write a model's weights into; what goes with them is added, and all of it appears at once.

    `dtype` is that of most weights, `source` the checkpoint whose tokenizer and ways to generate it takes over.
    """
    with new_folder(folder.expanduser()) as draft:
        yield draft
        stored = str(dtype).removeprefix("torch.")
        _write_json(draft / "config.json", write_config(spec, token_ids, dtype=stored))
        _write_json(draft / _GENERATION, {**_generation(source), **token_fields(token_ids)})
        if source is not None:
            copy_tokenizer(source, draft)


def token_ids_in(folder: Path) -> TokenIds:
    """Special tokens that a checkpoint folder states."""
    return read_token_ids(read_json(folder / "config.json"), _generation(folder))


def _generation(source: Path | None) -> dict[str, Any]:
    """What a folder's generation_config.json says, such as the temperature that its makers advise."""
    file = None if source is None else source / _GENERATION
    return read_json(file) if file is not None and file.is_file() else {}


def _write_json(file: Path, data: dict[str, Any]) -> None:
    write_whole(file, json.dumps(data, indent=2, allow_nan=False) + "\n")
