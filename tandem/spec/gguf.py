"""The header of a GGUF file: its metadata, the place of its tensors, and the model that they describe.

GGUF is llama.cpp's file format (docs/gguf.md in ggml, version 3; little-endian). The header is read here in a tenth of
a second, without the package `gguf`, whose reader takes seconds for a vocabulary; the weights are another matter
(`tandem.model.gguf`). Llama- and Qwen3-shaped models are known, other architectures are refused by name.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.spec.huggingface import read_config
from tandem.spec.model import ModelSpec

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_HIGHEST_DIMENSIONS = 8
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FORMATS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
FORMATS |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
FORMATS |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0"}
FORMATS |= {35: "TQ2_0", 39: "MXFP4"}
"""ggml's tensor formats by number (`ggml_type` in ggml.h)."""
ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that holds no weights: by what each rotary frequency is divided (Llama 3.1 and later)."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is outermost first, as in torch; `kind` is ggml's number of its format."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    """Bytes from the start of the file."""
    size: int = 0
    """Bytes up to the next tensor or the end of the file."""

    @property
    def format(self) -> str:
        """ggml's name of its format."""
        return FORMATS.get(self.kind, f"ggml {self.kind}")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of one file, in file order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, as the file states it."""
        return str(self.metadata.get("general.architecture"))

    def get(self, field: str, default: Any = None) -> Any:
        """Metadata of the architecture: `get("block_count")` is `llama.block_count` in a Llama."""
        return self.metadata.get(f"{self.architecture}.{field}", default)


class _Cursor:
    """Reads little-endian values one after the other; reading past the end is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise struct.error("text beyond the end")
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def texts(self, count: int) -> list[str]:
        """What `count` calls of `text` give; vocabularies are long, so without calls."""
        data, at, found = self.data, self.at, []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            found.append(data[start:at])
        self.at = at
        if at > len(data):
            raise struct.error("text beyond the end")
        return [text.decode("utf-8", errors="replace") for text in found]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, size = self.scalar("I"), self.scalar("Q")
        if size > len(self.data):
            raise struct.error("array beyond the end")
        if kind == _STRING:
            return self.texts(size)
        if kind == _ARRAY:
            return [self.value(kind) for _ in range(size)]
        layout = f"<{size}{_SCALARS[kind]}"
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return list(values)


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensor places of a GGUF file. Raises SpecError where it is not one, or is cut short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (struct.error, KeyError, ValueError) as wrong:
        raise SpecError(f"{path}: not a whole GGUF file ({' '.join(str(wrong).split())})") from None
    except OSError as wrong:
        raise SpecError(f"{path}: cannot be read ({wrong.strerror})") from None


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise SpecError(f"{path}: GGUF version {version}; versions 2 and 3 are read")
    count, fields = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.scalar("I"))
    relative: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.scalar("I")
        if dimensions > _HIGHEST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        relative[name] = shape, cursor.scalar("I"), cursor.scalar("Q")
    alignment = int(metadata.get("general.alignment", 32))
    start, end = math.ceil(cursor.at / alignment) * alignment, len(cursor.data)
    ends = sorted({start + offset for *_, offset in relative.values()})
    if ends and ends[-1] >= end:
        raise ValueError("tensors beyond the end")
    following = dict(pairwise([*ends, end]))
    tensors = {
        name: GgufTensor(shape, kind, start + offset, following[start + offset] - start - offset)
        for name, (shape, kind, offset) in relative.items()
    }
    return GgufHeader(path, metadata, tensors)


def read_gguf_spec(header: GgufHeader, *, name: str) -> ModelSpec:
    """The model of a GGUF file, read through the same rules as a config.json."""
    return read_config(gguf_config(header), name=name)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The config.json that transformers would write for a GGUF file's model, token ids included.

    Single-precision numbers are given as the shortest decimal that means the same: 1e-05, not 9.999999747378752e-06.
    """
    kind = header.architecture
    if kind not in _ARCHITECTURES:
        raise SpecError(
            f"general.architecture={kind!r}: not read from GGUF; {' and '.join(_ARCHITECTURES)} are. "
            "Give the Hugging Face checkpoint of this model instead"
        )
    if header.get("expert_count"):
        raise SpecError(f"{kind}.expert_count={header.get('expert_count')}: experts are not read from GGUF")
    heads, h = _number(header, "attention.head_count"), _number(header, "embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SpecError(f"{header.path}: holds no token_embd.weight of two dimensions")
    head_dim = header.get("attention.key_length") or header.get("rope.dimension_count") or h // max(heads, 1)
    if header.get("rope.dimension_count", head_dim) != head_dim:
        raise SpecError(f"{kind}.rope.dimension_count={header.get('rope.dimension_count')}: must be the head size {head_dim}")
    tokens = {f"{key}_token_id": header.metadata.get(f"tokenizer.ggml.{long}_token_id") for key, long in _TOKENS.items()}
    return {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": embedding.shape[0],
        "hidden_size": h,
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_hidden_layers": _number(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _number(header, "context_length"),
        "rms_norm_eps": _shortest(header.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_parameters": _rope(header, head_dim),
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{name: value for name, value in tokens.items() if value is not None},
    }


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _number(header: GgufHeader, field: str) -> int:
    value = header.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{header.architecture}.{field}={value!r}: must be one whole number for all layers")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same number in single precision."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _rope(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the model. GGUF keeps Llama 3's scaling only as factors: its numbers are found again."""
    theta = _shortest(header.get("rope.freq_base", 10000.0))
    scaling = header.get("rope.scaling.type", "none")
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(header.get("rope.scaling.factor"))}
    if scaling != "none":
        raise SpecError(f"{header.architecture}.rope.scaling.type={scaling!r}: none and linear are read from GGUF")
    factors = header.tensors.get(ROPE_FACTORS)
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    with header.path.open("rb") as file:
        file.seek(factors.offset)
        values = struct.unpack(f"<{head_dim // 2}f", file.read(head_dim // 2 * 4))
    found = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": max(values),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for i, value in enumerate(values):
        if abs(value - _llama3_factor(theta ** (-2 * i / head_dim), max(values))) > 1e-3 * value:
            raise SpecError(f"{ROPE_FACTORS}: not the factors of Llama 3 (low 1, high 4, 8,192 tokens), and no others are read")
    return found


def _llama3_factor(frequency: float, factor: float) -> float:
    """By what Llama 3.1 divides a rotary frequency: 1 for short waves, `factor` for long ones, smooth between."""
    turns = 8192 * frequency / (2 * math.pi)
    smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
