"""Two checkpoints of one model as one: w = (1 - a) w1 + a w2, tensor by tensor (paper A merges its reasoning-strong and its
chat-strong model like this, with a about 0.5 out of a sweep)."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tandem.model.checkpoint import new_folder
from tandem.model.hybrid import Decoder
from tandem.model.shards import INDEX, Place, read_places
from tandem.model.tokenizer import TOKENIZER, copy_tokenizer
from tandem.spec.catalog import load_spec, read_json
from tandem.spec.errors import SpecError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**20
"""Numbers that are merged at once."""
_BESIDE = ("config.json", "generation_config.json")


def merge_tensors(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) first + alpha second, computed in fp32, in the dtype of the first; at 0 and 1 the bits of that one."""
    if alpha in (0.0, 1.0):
        return (second if alpha else first).to(first.dtype, copy=True)
    return ((1 - alpha) * first.float() + alpha * second.float()).to(first.dtype)


def merge_folders(first: str | Path, second: str | Path, folder: str | Path, *, alpha: float) -> None:
    """Write the merge of two checkpoint folders; configuration, tokenizer and shards are those of the first.

    Memory holds a few MiB of the weights at a time. Refused in one line where the two have other tensors, shapes, dtypes,
    tokens or another architecture, before anything is written; `folder` never holds half of a checkpoint (`new_folder`).
    """
    alpha = _share(alpha)
    first, second, folder = (Path(path).expanduser() for path in (first, second, folder))
    if folder.resolve() in (first.resolve(), second.resolve()):
        raise SpecError(f"folder={str(folder)!r}: is one of the two that are merged; name another one")
    ours, theirs = read_places(first), read_places(second)
    _check_folders(first, second)
    _check_alike({n: (p.shape, p.dtype) for n, p in ours.items()}, {n: (p.shape, p.dtype) for n, p in theirs.items()})
    for name, place in ours.items():
        if place.dtype not in _DTYPES:
            raise SpecError(f"{name} is stored as {place.dtype}: weights are merged in {', '.join(_DTYPES)}")
    with new_folder(folder) as draft:
        for file in {place.file for place in ours.values()}:
            _write_shard(draft / file.name, file, {n: p for n, p in ours.items() if p.file == file}, theirs, alpha)
        for name in (*_BESIDE, INDEX):
            if (first / name).is_file():
                shutil.copyfile(first / name, draft / name)
        copy_tokenizer(first, draft)


def _write_shard(to: Path, file: Path, ours: Mapping[str, Place], theirs: Mapping[str, Place], alpha: float) -> None:
    """A copy of the first one's file, with every tensor's bytes replaced where they lie."""
    shutil.copyfile(file, to)
    with to.open("r+b") as target:
        for name, place in ours.items() if alpha else ():
            _merge_place(target.fileno(), place, theirs[name], alpha)
        os.fsync(target.fileno())


def _merge_place(target: int, ours: Place, theirs: Place, alpha: float) -> None:
    dtype = _DTYPES[ours.dtype]
    width = _PIECE * dtype.itemsize
    with theirs.file.open("rb") as stream:
        for at in range(0, ours.size, width):
            size = min(width, ours.size - at)
            one = _numbers(os.pread(target, size, ours.start + at), size, dtype, ours.file)
            stream.seek(theirs.start + at)
            other = _numbers(stream.read(size), size, dtype, theirs.file)
            merged = merge_tensors(one, other, alpha).view(torch.uint8).numpy().data
            if os.pwrite(target, merged, ours.start + at) != size:
                raise SpecError(f"{ours.file.name}: could not be written whole; is the disk full?")


def _numbers(data: bytes, size: int, dtype: torch.dtype, file: Path) -> Tensor:
    if len(data) != size:
        raise SpecError(f"{file}: ended early; it changed while it was read")
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _check_folders(first: Path, second: Path) -> None:
    one, other = (replace(load_spec(folder), name="merged") for folder in (first, second))
    if one != other:
        raise SpecError(f"second={str(second)!r}: its config.json says another model than {str(first)!r}; merge two of one")
    vocabularies = [read_json(f / TOKENIZER).get("model") if (f / TOKENIZER).is_file() else None for f in (first, second)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise SpecError(f"second={str(second)!r}: its tokenizer has another vocabulary than {str(first)!r}; merge two of one")


def _check_alike(ours: Mapping[str, tuple[object, object]], theirs: Mapping[str, tuple[object, object]]) -> None:
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise SpecError(
            f"{name}: only in the {'first' if name in ours else 'second'} of the two; merge checkpoints of one model"
        )
    for name, (shape, dtype) in ours.items():
        if theirs[name] != (shape, dtype):
            other_shape, other_dtype = theirs[name]
            raise SpecError(
                f"{name}: is {dtype} {shape} in the first and {other_dtype} {other_shape} in the second; must be alike"
            )


def merge_decoders(first: Decoder, second: Decoder, *, alpha: float) -> Decoder:
    """The merge of two decoders as a new one; both stay as they are. Raises SpecError where they are not of one model."""
    alpha = _share(alpha)
    if replace(first.spec, name="merged") != replace(second.spec, name="merged"):
        raise SpecError(f"second={second.spec.name!r}: is another model than {first.spec.name!r}; merge two of one")
    ours, theirs = _weights(first), _weights(second)
    _check_alike({n: (t.shape, t.dtype) for n, t in ours.items()}, {n: (t.shape, t.dtype) for n, t in theirs.items()})
    for name, tensor in ours.items():
        if tensor.dtype not in _DTYPES.values():
            raise SpecError(f"{name} is {tensor.dtype}: weights are merged in {', '.join(_DTYPES)}")
    merged = copy.deepcopy(first)
    with torch.no_grad():
        for name, tensor in _weights(merged).items():
            tensor.copy_(merge_tensors(ours[name], theirs[name].to(tensor.device), alpha))
    return merged


def _weights(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _share(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise SpecError(f"alpha={alpha!r}: must be from 0 (the first) to 1 (the second)")
    return float(alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSweep:
    """What merges scored."""

    scores: tuple[tuple[float, float], ...]
    """Alpha and score, in the order that was asked for."""
    best: float
    """The alpha of the highest score; of equal ones the first."""


def merge_sweep(
    first: Decoder, second: Decoder, alphas: Sequence[float], score: Callable[[float, Decoder], float]
) -> MergeSweep:
    """Merge for every alpha and have `score(alpha, merged)`; one merged model is in memory at a time.

    Raises SpecError for no alphas, one outside 0 to 1, and a score that is no number.
    """
    if not alphas:
        raise SpecError("alphas=(): name at least one, such as 0.5")
    shares = [_share(alpha) for alpha in alphas]
    scores = [(alpha, float(score(alpha, merge_decoders(first, second, alpha=alpha)))) for alpha in shares]
    for alpha, value in scores:
        if math.isnan(value):
            raise SpecError(f"alpha={alpha}: its score is no number, so there is no best one")
    return MergeSweep(scores=tuple(scores), best=max(scores, key=lambda row: row[1])[0])
