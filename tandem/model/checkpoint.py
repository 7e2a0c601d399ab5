"""Weights of a decoder out of safetensors files and into them, tensor by tensor: there is never a second copy in memory.

Loading fills a decoder that was built on the meta device. Saving writes to new files and puts them in place at the end,
so that a folder never holds half of a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tandem.model.config_out import hub_format
from tandem.model.naming import Format, Stored, stored_tensors
from tandem.model.shards import INDEX, SINGLE, Place, match_places, read_places
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.model import ModelSpec

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALWAYS_FP32 = (".gate.e_score_correction_bias", ".mixer.gate.weight")
_NEVER_ROUNDED = (".A_log", ".D", ".dt_bias")
_STAGING_BYTES = 2**22
"""Of what is converted at once: large enough to be fast, small beside any model."""


class Filling:
    """A decoder on the meta device whose tensors become real one after the other.

    `dtype` None keeps each tensor as it is stored. As in transformers, a router's weights and correction are always fp32
    (NemotronHPreTrainedModel._keep_in_fp32_modules_strict). Unlike there, the few numbers a head that steer the scan keep
    their stored format when 16 bits are asked for: rounding A_log to bf16 moves a decay by 1 % and saves nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: torch.device | str) -> None:
        self.model = model
        self.dtype = dtype
        self.device = torch.device(device)

    def destination(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """Memory for one tensor of the file, stored there in `dtype`; experts get their row of the layer's stack."""
        path, _, leaf = stored.parameter.rpartition(".")
        module = self.model.get_submodule(path)
        held: Tensor = getattr(module, leaf)
        if held.is_meta:
            held = torch.empty(held.shape, dtype=self._kept(stored.parameter, dtype), device=self.device)
            setattr(module, leaf, held if leaf in module._buffers else nn.Parameter(held))
        return held.detach() if stored.expert is None else held.detach()[stored.expert]

    def _kept(self, parameter: str, stored: torch.dtype) -> torch.dtype:
        if parameter.endswith(_ALWAYS_FP32):
            return torch.float32
        if self.dtype is None or (parameter.endswith(_NEVER_ROUNDED) and self.dtype != torch.float32):
            return stored
        return self.dtype


def placed_tensors(spec: ModelSpec, form: Format, folder: Path) -> list[tuple[Place, Stored]]:
    """The tensors of a checkpoint folder in file order, as `fill` reads them. Raises SpecError for what does not fit."""
    matched = match_places(spec, form, read_places(folder), folder)
    for place, stored in matched:
        if place.dtype not in _DTYPES:
            raise SpecError(f"{folder}: {stored.name} is stored as {place.dtype}; weights are read from {', '.join(_DTYPES)}")
    return matched


def fill(filling: Filling, matched: Sequence[tuple[Place, Stored]]) -> None:
    """Read some tensors of a checkpoint into their places in a decoder."""
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
    for file, tensors in groupby(matched, key=lambda item: item[0].file):
        with FileIO(file) as stream:
            for place, stored in tensors:
                _read_into(stream, place, filling.destination(stored, _DTYPES[place.dtype]), staging)


def stored_dtype(place: Place) -> torch.dtype:
    """The format of a tensor among those that `placed_tensors` lets pass."""
    return _DTYPES[place.dtype]


def read_tensor(place: Place) -> Float[Tensor, "*shape"]:
    """One tensor of a checkpoint, in its stored format."""
    found = torch.empty(place.shape, dtype=_DTYPES[place.dtype])
    with FileIO(place.file) as stream:
        stream.seek(place.start)
        _read_bytes(stream, found.view(-1))
    return found


def _read_into(stream: FileIO, place: Place, to: Float[Tensor, "*shape"], staging: UInt8[Tensor, " bytes"]) -> None:
    """Read one tensor into memory that is there, straight or, where it has another format or device, in pieces."""
    stream.seek(place.start)
    stored, flat = _DTYPES[place.dtype], to.view(-1)
    if to.dtype == stored and to.device.type == "cpu":
        return _read_bytes(stream, flat)
    buffer = staging.view(stored)
    for at in range(0, flat.numel(), buffer.numel()):
        piece = buffer[: flat.numel() - at]
        _read_bytes(stream, piece)
        flat[at : at + piece.numel()].copy_(piece)


def _read_bytes(stream: FileIO, flat: Float[Tensor, " numbers"]) -> None:
    view = flat.view(torch.uint8).numpy().data
    at = 0
    while at < len(view):
        count = stream.readinto(view[at : at + 2**30])
        if not count:
            raise SpecError(f"{stream.name!s}: ended early; it changed while it was read")
        at += count


def write_weights(model: nn.Module, spec: ModelSpec, folder: Path, max_shard_bytes: int) -> None:
    """Write a decoder's weights into a folder, as one file or, beyond `max_shard_bytes`, as shards with an index."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    write_tensors(held, stored_tensors(spec, hub_format(spec)), folder, max_shard_bytes)


def write_tensors(held: dict[str, Tensor], tensors: Sequence[Stored], folder: Path, max_shard_bytes: int) -> None:
    """`write_weights` of tensors by their names in the decoder, whoever holds them."""
    for stored in tensors:
        if stored.parameter not in held:
            raise SpecError(f"{stored.parameter}: not among the model's weights, which are saved by these names")
        dtype = held[stored.parameter].dtype
        if dtype not in _NAMES:
            raise SpecError(
                f"{stored.parameter} is {dtype}: not in a 16- or 32-bit float format; others, quantised ones too, are not saved"
            )
    _check_head(held, tensors)
    dtypes = {stored: held[stored.parameter].dtype for stored in tensors}
    write_parts(tensors, dtypes, lambda stored: _part(stored, held), folder, max_shard_bytes)


def write_parts(
    tensors: Sequence[Stored],
    dtypes: Mapping[Stored, torch.dtype],
    part: Callable[[Stored], Tensor],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """`write_weights` of tensors that `part` makes one after the other, in these formats: none is held longer than it takes."""
    shards = _shards(tensors, dtypes, max_shard_bytes)
    if len(shards) == 1:
        return _write_shard(folder / SINGLE, shards[0], dtypes, part)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, dtypes, part)
        weight_map |= dict.fromkeys((stored.name for stored in shard), file)
    total = sum(_bytes(stored, dtypes) for stored in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _check_head(held: dict[str, Tensor], tensors: Sequence[Stored]) -> None:
    """Refuse a head of its own where the file has none, as the embedding serves."""
    head, embedding = held.get("lm_head.weight"), held.get("backbone.embeddings.weight")
    if head is None or embedding is None or head is embedding or any(s.parameter == "lm_head.weight" for s in tensors):
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise SpecError("tied_embeddings=True: lm_head.weight is not the embedding and would be lost; save an untied spec")


def _part(stored: Stored, held: dict[str, Tensor]) -> Tensor:
    whole = held[stored.parameter].detach()
    return whole if stored.expert is None else whole[stored.expert]


def _bytes(stored: Stored, dtypes: Mapping[Stored, torch.dtype]) -> int:
    return math.prod(stored.shape) * dtypes[stored].itemsize


def _shards(tensors: Sequence[Stored], dtypes: Mapping[Stored, torch.dtype], max_shard_bytes: int) -> list[list[Stored]]:
    """Runs of tensors of at most that many bytes each; a tensor beyond it has a shard of its own."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for stored in tensors:
        size = _bytes(stored, dtypes)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += size
    return shards


def _write_shard(
    file: Path, tensors: Sequence[Stored], dtypes: Mapping[Stored, torch.dtype], part: Callable[[Stored], Tensor]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for stored in tensors:
        size = _bytes(stored, dtypes)
        dtype = _NAMES[dtypes[stored]]
        header[stored.name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for stored in tensors:
            flat = part(stored).contiguous().view(-1)
            stream.write(flat.view(torch.uint8).cpu().numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which takes its place only when all of it is written.

    A folder that is not there appears whole, by one rename. In one that is there, each file is replaced whole (weights
    first, config.json and the index last), other files stay, and weights of an earlier checkpoint that no longer belong
    to it are removed.
    """
    exists = folder.is_dir()
    if folder.exists() and not exists:
        raise SpecError(f"folder={str(folder)!r}: is a file; name a folder")
    try:
        if not exists:
            folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder if exists else folder.parent, prefix=f".{folder.name}."))
    except OSError as wrong:
        raise SpecError(f"folder={str(folder)!r}: cannot be written ({wrong.strerror})") from None
    try:
        yield draft
        if exists:
            _replace_files(draft, folder)
        else:
            draft.chmod(0o755)
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace_files(draft: Path, folder: Path) -> None:
    last = ("config.json", INDEX)
    names = [file.name for file in draft.iterdir() if file.name not in last]
    written = {*names, *(name for name in last if (draft / name).exists())}
    stale = {p.name for pattern in ("model*.safetensors", INDEX) for p in folder.glob(pattern)} - written
    for name in [*names, *(name for name in last if name in written)]:
        (draft / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink()
