"""Files of a checkpoint: where each tensor lies, and whether they are the tensors of the model. Needs no torch.

A safetensors file is the length of its header (8 bytes, little-endian), the header as JSON (name, dtype, shape, place in
the data) and the data. Its place is all that a streaming reader needs, so the file is read here directly: no mapping of
it stays behind, which would count as a second copy in memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.model.naming import FORMATS, Format, Shape, Stored, check_format, gguf_name, read_name, stored_tensors
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.gguf import ROPE_FACTORS, GgufHeader, read_header
from tandem.spec.model import ModelSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ITEM_BYTES |= {"U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100 * 2**20
"""The limit of the safetensors library."""
_NAMED = 3
"""Tensors that a message names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `start` is in bytes from the beginning of the file, `dtype` is safetensors' word."""

    file: Path
    dtype: str
    shape: Shape
    start: int
    size: int


def read_places(folder: Path) -> dict[str, Place]:
    """Every tensor of a checkpoint folder, in the order of its files and inside them. Raises SpecError naming the file."""
    if (folder / INDEX).is_file():
        shards = _shard_names(folder / INDEX)
    elif (folder / SINGLE).is_file():
        shards = {SINGLE: set()}
    else:
        raise SpecError(f"model={str(folder)!r}: holds neither {SINGLE} nor {INDEX}; only safetensors weights are read")
    places: dict[str, Place] = {}
    for shard, names in shards.items():
        found = read_shard_header(folder / shard)
        if names - found.keys():
            raise SpecError(f"{folder / shard}: lacks {_listed(sorted(names - found.keys()))}, which {INDEX} places there")
        places |= found
    return places


def read_shard_header(file: Path) -> dict[str, Place]:
    """The tensors of one safetensors file in file order."""
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, total - 8):
                raise ValueError(f"its header has {length:,} bytes")
            header = json.loads(stream.read(length))
        data = 8 + length
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {name: _place(file, entry, data) for name, entry in entries.items()}
    except OSError as wrong:
        raise SpecError(f"{file}: cannot be read ({wrong.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{file}: not a whole safetensors file ({' '.join(str(wrong).split())})") from None
    end = max((p.start + p.size for p in places.values()), default=data)
    if end > total:
        raise SpecError(f"{file}: is cut short; its header places data up to byte {end:,} of {total:,}")
    return dict(sorted(places.items(), key=lambda item: item[1].start))


def _place(file: Path, entry: dict[str, Any], data: int) -> Place:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    place = Place(file, str(entry["dtype"]), shape, data + start, end - start)
    wanted = math.prod(shape) * ITEM_BYTES.get(place.dtype, 0)
    if start < 0 or (wanted and place.size != wanted):
        raise ValueError(f"{place.size:,} bytes for {place.dtype} of shape {list(shape)}")
    return place


def _shard_names(index: Path) -> dict[str, set[str]]:
    """File -> tensors that the index places in it, in the order of file names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {str(shard): set() for shard in sorted(weight_map.values())}
        for name, shard in weight_map.items():
            shards[shard].add(name)
    except OSError as wrong:
        raise SpecError(f"{index}: cannot be read ({wrong.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{index}: not an index of safetensors files ({' '.join(str(wrong).split())})") from None
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise SpecError(f"{index}: names the file {shard!r}, which is not in this folder")
    return shards


def match_tensors(
    expected: Iterable[Stored], found: Mapping[str, Shape], where: Path, left_aside: Callable[[str], bool]
) -> dict[str, Stored]:
    """Name in the file -> what it is in the decoder. Raises SpecError naming missing, surplus and misshapen tensors."""
    missing = {stored.name: stored for stored in expected}
    matched = {name: missing.pop(name) for name in found if name in missing}
    surplus = [name for name in found if name not in matched and not left_aside(name)]
    if missing or surplus:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"holds {_listed(surplus)}, which the model does not have"] if surplus else []
        raise SpecError(f"{where}: {' and '.join(parts)}; does the configuration belong to these weights?")
    wrong = [f"{name} is {list(found[name])}, must be {list(s.shape)}" for name, s in matched.items() if found[name] != s.shape]
    if wrong:
        raise SpecError(f"{where}: {_listed(wrong)}; does the configuration belong to these weights?")
    return matched


def match_places(spec: ModelSpec, form: Format, places: Mapping[str, Place], where: Path) -> list[tuple[Place, Stored]]:
    """The tensors of a checkpoint in file order, each with what it is in the decoder.

    Left aside, as in transformers, are a head that is stored although it is tied, layers for further tokens, and a
    constant of old Llama files.
    """

    def left_aside(name: str) -> bool:
        tied = spec.tied_embeddings and name == "lm_head.weight"
        return tied or name.startswith("mtp.") or name.endswith(".rotary_emb.inv_freq")

    named = {read_name(name, form): place for name, place in places.items()}
    shapes = {name: place.shape for name, place in named.items()}
    matched = match_tensors(stored_tensors(spec, form), shapes, where, left_aside)
    return [(place, matched[name]) for name, place in named.items() if name in matched]


def match_gguf(spec: ModelSpec, header: GgufHeader) -> dict[str, Stored]:
    """llama.cpp's name -> what it is in the decoder, in file order; rotary factors are no weights."""
    form = check_format(header.architecture)
    expected = [replace(stored, name=gguf_name(stored.name)) for stored in stored_tensors(spec, form)]
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    return match_tensors(expected, shapes, header.path, lambda name: name == ROPE_FACTORS)


def describe_weights(path: Path, spec: ModelSpec) -> dict[str, Any] | None:
    """What a checkpoint folder or GGUF file holds: files, tensors, bytes of each format; None where it has no weights.

    Names and shapes are compared with the specification, and what does not fit is a SpecError; `checked` is False for an
    architecture whose names are not known here.
    """
    if path.is_file():
        header = read_header(path)
        match_gguf(spec, header)
        return _summary(1, [(tensor.format, tensor.size) for tensor in header.tensors.values()], True)
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        return None
    places = read_places(path)
    form = read_json(path / "config.json").get("model_type")
    if form in FORMATS:
        match_places(spec, check_format(form), places, path)
    files = len({place.file for place in places.values()})
    return _summary(files, [(place.dtype, place.size) for place in places.values()], form in FORMATS)


def _summary(files: int, tensors: list[tuple[str, int]], checked: bool) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for form, size in tensors:
        sizes[form] += size
    return {"files": files, "tensors": len(tensors), "bytes": sizes.total(), "formats": dict(sizes), "checked": checked}


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + rest
