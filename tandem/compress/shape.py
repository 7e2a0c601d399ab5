"""What a pruned model keeps of its teacher, as sizes, and the specification that follows (paper A section 4).

Which units are kept is the business of importance; here are only their numbers, with every rule that slicing must keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tandem.perf.memory import inspect_model
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import require_int

_LETTERS = {
    "hidden_size": "h",
    "ffn_size": "f",
    "mamba_heads": "m",
    "mamba_head_dim": "c",
    "attention_heads": "a",
    "experts": "e",
    "expert_ffn_size": "x",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes that a pruned model keeps; None: as in the teacher. One size holds for all layers of its kind."""

    layers: tuple[int, ...] | None = None
    """Indices of the teacher's layers that stay, from 0, in rising order."""
    hidden_size: int | None = None
    """Embedding channels."""
    ffn_size: int | None = None
    """Neurons of every MLP layer; experts have their own size."""
    mamba_heads: int | None = None
    """Heads of every Mamba layer; each group keeps the same number."""
    mamba_head_dim: int | None = None
    """Channels of every Mamba head."""
    attention_heads: int | None = None
    """Query heads of every attention layer; KV heads all stay, each with the same number of query heads."""
    experts: int | None = None
    """Routed experts of every MoE layer."""
    expert_ffn_size: int | None = None
    """Neurons of every routed expert; shared experts stay as they are."""

    def __post_init__(self) -> None:
        for name, value in self.sizes().items():
            require_int(name, value)
        if self.layers is None:
            return
        for i in self.layers:
            require_int("layers", i, low=0)
        if not self.layers:
            raise SpecError("layers=(): must name one at least, or be None for all")
        if any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise SpecError(f"layers={list(self.layers)}: must rise, each named once")

    def sizes(self) -> dict[str, int]:
        """The sizes that are named, layers left out."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return {name: value for name, value in named.items() if value is not None}

    def kept_layers(self, spec: ModelSpec) -> tuple[int, ...]:
        """Indices of the teacher's layers that stay. Raises SpecError for one that the teacher does not have."""
        count = len(spec.layers)
        if self.layers is None:
            return tuple(range(count))
        if self.layers[-1] >= count:
            raise SpecError(f"layers={self.layers[-1]}: {spec.name} has layers 0 to {count - 1}")
        return self.layers

    def to_json(self) -> dict[str, Any]:
        """All fields; None where the teacher's size stays."""
        return {**asdict(self), "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shape:
        """The shape that `to_json` wrote. Raises SpecError for a field that is not known."""
        names = [f.name for f in fields(cls)]
        for name in data:
            if name not in names:
                raise SpecError(f"{name}={data[name]!r}: no size of a shape; there are {', '.join(names)}")
        layers = data.get("layers")
        return cls(**{**data, "layers": None if layers is None else tuple(layers)})


def shape_of(spec: ModelSpec) -> Shape:
    """The sizes that a model has, all named but its layers. Raises SpecError where layers of a kind differ in one."""
    found: dict[str, Any] = {"hidden_size": spec.hidden_size}
    for i, mixer in enumerate(spec.layers):
        for name, size in _sizes(mixer):
            if found.setdefault(name, size) != size:
                raise SpecError(f"layers[{i}].{name}={size}: differs from {found[name]} of an earlier layer; sizes must agree")
    return Shape(**found)


def common_sizes(spec: ModelSpec) -> dict[str, int | None]:
    """Every size that a shape can name; None where no layer has it or layers differ in it."""
    found: dict[str, set[int]] = {f.name: set() for f in fields(Shape) if f.name != "layers"}
    found["hidden_size"].add(spec.hidden_size)
    for mixer, _ in spec.mixers:
        for name, size in _sizes(mixer):
            found[name].add(size)
    return {name: next(iter(sizes)) if len(sizes) == 1 else None for name, sizes in found.items()}


def pruned_spec(spec: ModelSpec, shape: Shape, *, name: str | None = None) -> ModelSpec:
    """The teacher `spec` cut to `shape`, under `name` or the teacher's own; a shape that keeps all gives the teacher.

    Raises SpecError, one line that says what would do, where slicing cannot give that shape: a size above the teacher's or
    that no kept layer has, Mamba heads that their groups cannot share (paper A section 4.2: the same count in each), query
    heads that KV heads cannot, experts fewer than a token is sent to.
    """
    hidden = shape.hidden_size or spec.hidden_size
    _at_most("hidden_size", hidden, spec.hidden_size, spec.name)
    kept = shape.kept_layers(spec)
    layers = tuple(_cut(spec.layers[i], shape, f"layer {i} of {spec.name}") for i in kept)
    had = {size for mixer in layers for size, _ in _sizes(mixer)}
    for size, value in shape.sizes().items():
        if size != "hidden_size" and size not in had:
            there = ", ".join(["hidden_size", *sorted(had)])
            raise SpecError(f"{size}={value}: no layer that is kept of {spec.name} has one; there are {there}")
    return replace(spec, name=name or spec.name, hidden_size=hidden, layers=layers)


def shape_name(spec: ModelSpec, shape: Shape) -> str:
    """The teacher's name with what is cut: `nano-hybrid-10L-h176-f576-m10`; the teacher's own where nothing is named."""
    parts = [] if shape.layers is None else [f"{len(shape.layers)}L"]
    parts += [f"{_LETTERS[name]}{size}" for name, size in shape.sizes().items()]
    return "-".join([spec.name, *parts])


def total_bytes(spec: ModelSpec, *, context: int, batch: int = 1, overhead_bytes: int = 0, precision: str = "bf16") -> int:
    """Bytes that serving takes: weights, `batch` sequences of `context` tokens (KV, convolution, fp32 SSM state), overhead.

    The arithmetic of paper A section 4.1; `overhead_bytes` stands for activations and workspace. Raises SpecError for numbers
    that cannot be.
    """
    require_int("overhead_bytes", overhead_bytes, low=0, high=10**15)
    held: int = inspect_model(spec, context=context, batch=batch, dtype=precision)["total_bytes"]
    return held + overhead_bytes


def _sizes(mixer: Mixer) -> Iterator[tuple[str, int]]:
    """Sizes of a layer that a shape can name; mixers that are not pruned have none."""
    match mixer:
        case MLP():
            yield "ffn_size", mixer.ffn_size
        case Mamba2():
            yield "mamba_heads", mixer.num_heads
            yield "mamba_head_dim", mixer.head_dim
        case Attention():
            yield "attention_heads", mixer.num_heads
        case MoE():
            yield "experts", mixer.num_experts
            yield "expert_ffn_size", mixer.ffn_size
        case _:
            return


def _cut(mixer: Mixer, shape: Shape, where: str) -> Mixer:
    """One layer in the sizes of the shape."""
    kept = {name: getattr(shape, name) or size for name, size in _sizes(mixer)}
    for name, size in _sizes(mixer):
        _at_most(name, kept[name], size, where)
    match mixer:
        case MLP():
            return replace(mixer, ffn_size=kept["ffn_size"])
        case Mamba2():
            _share("mamba_heads", kept["mamba_heads"], mixer.groups, f"the {mixer.groups} groups of {where}")
            return replace(mixer, num_heads=kept["mamba_heads"], head_dim=kept["mamba_head_dim"])
        case Attention():
            _share(
                "attention_heads", kept["attention_heads"], mixer.num_kv_heads, f"the {mixer.num_kv_heads} KV heads of {where}"
            )
            return replace(mixer, num_heads=kept["attention_heads"])
        case MoE():
            _enough_experts(mixer, kept["experts"], where)
            return replace(mixer, num_experts=kept["experts"], ffn_size=kept["expert_ffn_size"])
        case _:
            return mixer


def _at_most(name: str, value: int, most: int, where: str) -> None:
    if value > most:
        raise SpecError(f"{name}={value}: must be at most the {most} of {where}")


def _share(name: str, value: int, parts: int, whose: str) -> None:
    if value % parts:
        raise SpecError(f"{name}={value}: must be a multiple of {parts}, as {whose} keep the same number each")


def _enough_experts(mixer: MoE, experts: int, where: str) -> None:
    if experts < mixer.top_k:
        raise SpecError(f"experts={experts}: must be at least the {mixer.top_k} that {where} sends a token to")
    _share("experts", experts, mixer.groups, f"the {mixer.groups} groups of experts of {where}")
    reach = experts // mixer.groups * mixer.top_groups
    if reach < mixer.top_k:
        least = -(-mixer.top_k // mixer.top_groups) * mixer.groups
        raise SpecError(f"experts={experts}: must be at least {least}, or {where} chooses {mixer.top_k} among {reach} experts")
