"""Weights of a decoder out of a GGUF file, whatever quantisation it has, one tensor after the other.

In Llama files, llama.cpp (`convert_hf_to_gguf.py`) keeps the rows of every query and key head in another order, pairs of
the rotation side by side; they are put back here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.model.checkpoint import Filling
from tandem.model.naming import Stored
from tandem.model.shards import match_gguf
from tandem.spec.errors import SpecError
from tandem.spec.gguf import GgufHeader
from tandem.spec.model import Attention, ModelSpec

_PIECE = 2**18
"""Numbers that are dequantised at once: so many that their temporaries stay in a CPU's cache."""


def read_gguf_weights(filling: Filling, spec: ModelSpec, header: GgufHeader) -> None:
    """Fill a decoder from a GGUF file, in file order. What does not fit is refused before anything is read."""
    with _one_thread():
        for name, stored in match_gguf(spec, header).items():
            rows = _row_order(stored, spec) if header.architecture == "llama" else None
            to = filling.destination(stored, torch.float32)
            to = to.view(to.shape[0], -1)
            for at, piece in _pieces(header, name):
                values = torch.from_numpy(piece).to(to.device, to.dtype)
                if rows is None:
                    to[at : at + len(values)] = values
                else:
                    to.index_copy_(0, rows[at : at + len(values)].to(to.device), values)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copies of pieces that fit a cache gain nothing from threads, and on a busy machine wait for them ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row_order(stored: Stored, spec: ModelSpec) -> Tensor | None:
    """Where each row of the file belongs, for the rows of queries and keys; None where they are in order.

    Row h * d + 2 * i + s of the file is row h * d + s * d / 2 + i of a head's d rows: member s of its pair i.
    """
    layer, _, leaf = stored.parameter.removeprefix("backbone.layers.").partition(".mixer.")
    if not leaf.startswith(("q_proj.", "k_proj.")):
        return None
    mixer = spec.layers[int(layer)]
    assert isinstance(mixer, Attention)
    rows = torch.arange(stored.shape[0]).view(-1, 2, mixer.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def _pieces(header: GgufHeader, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor's rows in fp32, some at a time, each with the number of its first row. A vector is rows of one number."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = header.tensors[name]
    columns = tensor.shape[-1]
    try:
        kind = GGMLQuantizationType(tensor.kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        raise SpecError(f"{header.path}: {name} is in ggml's format {tensor.kind}, which cannot be dequantised") from None
    block, size = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise SpecError(f"{header.path}: {name} has {columns} columns, which blocks of {block} ({kind.name}) do not divide")
    row_bytes = columns // block * size
    rows = int(np.prod(tensor.shape[:-1]))
    step = max(1, _PIECE // columns)
    with header.path.open("rb") as stream:
        stream.seek(tensor.offset)
        for at in range(0, rows, step):
            count = min(step, rows - at)
            data = np.fromfile(stream, np.uint8, count * row_bytes)
            if data.size < count * row_bytes:
                raise SpecError(f"{header.path}: is cut short inside {name}")
            values = np.asarray(dequantize(data.reshape(1, -1), kind), np.float32).reshape(count, columns)
            yield (at, values) if len(tensor.shape) > 1 else (0, values.reshape(-1, 1))
