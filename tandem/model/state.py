"""What a decoder remembers of its sequences, as one object that can be cut, joined, moved and restored to the bit.

An attention layer remembers keys and values of every token, a Mamba-2 layer its last convolution inputs and its SSM
state, other layers nothing. Token i of a sequence lies at slot i: there is no padding inside, and rows of one state may
differ in length.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, Mamba2, Mixer, ModelSpec

_MAGIC = b"TANDEMSQ"
_VERSION = 1
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer; slots beyond a row's length hold nothing of meaning."""

    keys: Float[Tensor, "batch kv_heads capacity head_dim"]
    values: Float[Tensor, "batch kv_heads capacity head_dim"]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys, values."""
        return self.keys, self.values


@dataclass(slots=True)
class MambaState:
    """The last conv_kernel - 1 inputs of the convolution, oldest first, and the SSM state of one Mamba-2 layer."""

    conv: Float[Tensor, "batch conv_width window"]
    ssm: Float[Tensor, "batch heads head_dim state_dim"]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Convolution window, SSM state."""
        return self.conv, self.ssm


LayerState = AttentionState | MambaState | None


@dataclass(slots=True)
class SequenceState:
    """State of a batch of sequences after `lengths` tokens; `layers` has one entry a layer of the model.

    `lengths` is on the CPU whatever the device of the tensors. Keys, values and windows have one dtype; the SSM state is
    fp32 (paper A section 1.1: mamba_ssm_cache_dtype).
    """

    lengths: Int[Tensor, " batch"]
    layers: tuple[LayerState, ...]

    @classmethod
    def zeros(
        cls,
        spec: ModelSpec,
        batch: int,
        *,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SequenceState:
        """State of `batch` sequences that have seen nothing, with room for `capacity` tokens each."""

        def fresh(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=of, device=device)

        layers: list[LayerState] = []
        for m in spec.layers:
            if isinstance(m, Attention):
                slots = (m.num_kv_heads, capacity, m.head_dim)
                layers.append(AttentionState(fresh(*slots, of=dtype), fresh(*slots, of=dtype)))
            elif isinstance(m, Mamba2):
                ssm = fresh(m.num_heads, m.head_dim, m.state_dim, of=torch.float32)
                layers.append(MambaState(fresh(m.conv_width, m.conv_kernel - 1, of=dtype), ssm))
            else:
                layers.append(None)
        return cls(torch.zeros(batch, dtype=torch.int64), tuple(layers))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int | None:
        """Tokens that each attention layer has room for; None without attention layers, where there is no bound."""
        return next((s.keys.shape[2] for s in self.layers if isinstance(s, AttentionState)), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the sequences need: `s0 + k * length` each (`ModelSpec.kv_bytes`, `state_bytes_per_sequence`)."""
        return sum(part.numel() * part.element_size() for part in self._parts())

    def check(self, spec: ModelSpec, rows: int, device: torch.device) -> None:
        """Raise a SpecError unless this is the state of `rows` sequences of that model, on that device."""
        if self.batch != rows:
            raise SpecError(f"state has {self.batch} sequences: input_ids has {rows} rows")
        if len(self.layers) != len(spec.layers):
            raise SpecError(f"state has {len(self.layers)} layers: {spec.name} has {len(spec.layers)}")
        for i, (m, s) in enumerate(zip(spec.layers, self.layers, strict=True)):
            held: tuple[Tensor, ...] = () if s is None else s.tensors
            if _row_shapes(s) != _row_shapes_of(m) or any(len(t) != rows for t in held):
                shapes = [list(t.shape) for t in held]
                raise SpecError(f"state of layer {i} has shapes {shapes}: not of {spec.name}'s {type(m).__name__}")
            if any(t.device != device for t in held):
                raise SpecError(f"state of layer {i} is on {held[0].device}: the model is on {device}; use state.to")

    def reserve(self, tokens: int) -> None:
        """Make room for at least `tokens` tokens in each sequence; what is grown at least doubles.

        Outside of `torch.inference_mode`, tensors that were made under it are copied first: torch lets nobody write to them.
        """
        tensors = (self.lengths, *(t for s in self.layers if s is not None for t in s.tensors))
        if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in tensors):
            copy = self.clone()
            self.lengths, self.layers = copy.lengths, copy.layers
        for s in self.layers:
            if isinstance(s, AttentionState) and s.keys.shape[2] < tokens:
                room = max(tokens, 2 * s.keys.shape[2])
                s.keys, s.values = _grown(s.keys, room), _grown(s.values, room)

    def slice(self, rows: slice | Sequence[int]) -> SequenceState:
        """A copy of some rows, in the order given (a row may be repeated)."""
        numbers = range(self.batch)[rows] if isinstance(rows, slice) else rows
        wanted = [row.item() if isinstance(row, Tensor) else row for row in numbers]
        for row in wanted:
            if isinstance(row, bool):
                raise SpecError(f"rows holds {row}: must be numbers of rows; torch.tensor(rows).nonzero() gives them")
            if not -self.batch <= row < self.batch:
                raise SpecError(f"rows holds {row}: the state has {self.batch} sequences")
        index = torch.tensor(wanted, dtype=torch.int64) % max(1, self.batch)
        return SequenceState(self.lengths[index], tuple(_taken(s, index) for s in self.layers))

    @staticmethod
    def concat(states: Sequence[SequenceState]) -> SequenceState:
        """All rows of several states of one model, in order; lengths may differ."""
        if not states:
            raise SpecError("states=[]: needs at least one state")
        first = states[0]
        for other in states[1:]:
            if _kinds(other) != _kinds(first):
                raise SpecError("states: they are not of one model and dtype")
        room = max(int(s.lengths.max()) if s.batch else 0 for s in states)
        joined: list[LayerState] = []
        for parts in zip(*(s.layers for s in states), strict=True):
            if isinstance(parts[0], AttentionState):
                pairs = zip(*(_fitted(p, room).tensors for p in parts if p is not None), strict=True)
                joined.append(AttentionState(*(torch.cat(pair) for pair in pairs)))
            elif isinstance(parts[0], MambaState):
                joined.append(MambaState(*(torch.cat(pair) for pair in zip(*(p.tensors for p in parts if p), strict=True))))
            else:
                joined.append(None)
        return SequenceState(torch.cat([s.lengths for s in states]), tuple(joined))

    def clone(self) -> SequenceState:
        """A copy that shares no memory."""
        return self.slice(slice(None))

    def to(self, device: torch.device | str) -> SequenceState:
        """A copy on another device."""
        moved = (s and replace(s, **{n: getattr(s, n).to(device, copy=True) for n in s.__slots__}) for s in self.layers)
        return SequenceState(self.lengths.clone(), tuple(moved))

    def to_bytes(self) -> bytes:
        """Self-describing bytes: tag and version, a checksum of all that follows, a JSON header, the numbers."""
        header = {"lengths": self.lengths.tolist(), "layers": _kinds(self)}
        text = json.dumps(header, separators=(",", ":")).encode()
        body = b"".join((len(text).to_bytes(4, "little"), text, *(_raw(part) for part in self._parts())))
        return b"".join((_MAGIC, _VERSION.to_bytes(4, "little"), zlib.crc32(body).to_bytes(4, "little"), body))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> SequenceState:
        """The state that `to_bytes` wrote, bit for bit. Raises SpecError for bytes that are damaged or of another version."""
        view = memoryview(data)
        if bytes(view[:8]) != _MAGIC or len(view) < 20:
            raise SpecError(f"state bytes begin with {bytes(view[:8])!r}: not a sequence state, which begins with {_MAGIC!r}")
        version, checksum, size = (int.from_bytes(view[i : i + 4], "little") for i in (8, 12, 16))
        if version != _VERSION:
            raise SpecError(f"state version={version}: this program reads version {_VERSION}")
        found = zlib.crc32(view[16:])
        if found != checksum:
            raise SpecError(f"state bytes: checksum {found:#x} is not {checksum:#x}; send the state again")
        payload = view[20 + size :]
        try:
            header = json.loads(bytes(view[20 : 20 + size]))
            lengths, kinds = header["lengths"], header["layers"]
            described = cls(torch.tensor(lengths, dtype=torch.int64), tuple(_empty(kind, lengths, "meta") for kind in kinds))
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as wrong:
            raise SpecError(f"state bytes: their header is none of a sequence state ({type(wrong).__name__})") from None
        if not all(type(length) is int and length >= 0 for length in lengths) or described.nbytes != len(payload):
            raise SpecError(f"state bytes: {len(payload)} bytes of numbers, the header describes {described.nbytes}")
        state = cls(described.lengths, tuple(_empty(kind, lengths, "cpu") for kind in kinds))
        offset = 0
        for part in state._parts():
            size = part.numel() * part.element_size()
            if size:
                raw = torch.frombuffer(bytearray(payload[offset : offset + size]), dtype=part.dtype)
                part.copy_(raw.view(part.shape))
            offset += size
        return state

    def _parts(self) -> Iterator[Tensor]:
        """Views of what is known, layer by layer: each row's filled slots, whole windows and SSM states."""
        lengths = self.lengths.tolist()
        for s in self.layers:
            if isinstance(s, AttentionState):
                for tensor in s.tensors:
                    yield from (tensor[row, :, :length] for row, length in enumerate(lengths))
            elif s is not None:
                yield from s.tensors


def _kinds(state: SequenceState) -> list[dict[str, Any] | None]:
    """Kind, dtypes and shapes of each layer; of attention without the number of slots."""
    kinds: list[dict[str, Any] | None] = []
    for s in state.layers:
        if s is None:
            kinds.append(None)
            continue
        dtypes = [_NAMES[t.dtype] for t in s.tensors]
        kinds.append({"kind": type(s).__name__, "shapes": _row_shapes(s), "dtypes": dtypes})
    return kinds


def _row_shapes(state: LayerState) -> list[list[int]]:
    """Shapes of one row of a layer's state; of attention without the number of slots."""
    if isinstance(state, AttentionState):
        return [[*t.shape[1:2], *t.shape[3:]] for t in state.tensors]
    return [] if state is None else [list(t.shape[1:]) for t in state.tensors]


def _row_shapes_of(m: Mixer) -> list[list[int]]:
    """`_row_shapes` of a mixer's state."""
    match m:
        case Attention():
            return [[m.num_kv_heads, m.head_dim]] * 2
        case Mamba2():
            return [[m.conv_width, m.conv_kernel - 1], [m.num_heads, m.head_dim, m.state_dim]]
    return []


def _empty(kind: dict[str, Any] | None, lengths: list[int], device: str) -> LayerState:
    if kind is None:
        return None
    attention = kind["kind"] == "AttentionState"
    room, batch = max(lengths, default=0), len(lengths)
    tensors = [
        torch.zeros(batch, *([shape[0], room, shape[1]] if attention else shape), dtype=_DTYPES[name], device=device)
        for shape, name in zip(kind["shapes"], kind["dtypes"], strict=True)
    ]
    return AttentionState(*tensors) if attention else MambaState(*tensors)


def _raw(part: Float[Tensor, "*shape"]) -> bytes:
    return part.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _grown(tensor: Float[Tensor, "b g s p"], room: int) -> Float[Tensor, "b g room p"]:
    larger = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
    larger[:, :, : tensor.shape[2]] = tensor
    return larger


def _fitted(state: AttentionState | MambaState, room: int) -> AttentionState | MambaState:
    """An attention state with exactly `room` slots."""
    if isinstance(state, MambaState) or state.keys.shape[2] == room:
        return state
    if state.keys.shape[2] > room:
        return AttentionState(state.keys[:, :, :room], state.values[:, :, :room])
    return AttentionState(_grown(state.keys, room), _grown(state.values, room))


def _taken(state: LayerState, rows: Int[Tensor, " rows"]) -> LayerState:
    if state is None:
        return None
    index = rows.to(state.tensors[0].device)
    return type(state)(*(t.index_select(0, index) for t in state.tensors))
