"""The modules and weights that the C step stands in for: exactly those it computes, and whether they still are the same.

All are held weakly, so that replaced weights are freed at once. A module with a forward hook, or of a type that C does not
know (an adapter, a parametrised layer), is refused, and torch computes the step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from tandem.spec.errors import SpecError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Number formats of vectors, matrices and states that C reads; matrices can be int8 as well."""
_dtype = attrgetter("dtype")


class Parts:
    """Looks a decoder's parts up for a program, and remembers them: `settle` when all are known, then ask `current`."""

    def __init__(self, decoder: nn.Module) -> None:
        self._modules: list[nn.Module] = [decoder]  # emptied by `settle`
        self._parents: dict[int, nn.Module] = {}
        self._owners: dict[int, nn.Module] = {}
        self._hooks: list[Any] = [hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks]
        if any(self._hooks):
            raise SpecError("a forward hook is registered for all modules: the decode step in C would not call it")

    def child(self, parent: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
        """A sub-module, which must be of exactly one of these types and without hooks."""
        found = parent._modules.get(name)
        if type(found) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise SpecError(f"{name} is a {type(found).__name__}: the decode step in C needs a plain {wanted}")
        assert found is not None
        hooks = (found._forward_hooks, found._forward_pre_hooks)
        if any(hooks) or "forward" in vars(found):
            raise SpecError(f"{name} has a forward hook: the decode step in C would not call it")
        self._hooks += hooks
        self._parents[id(parent)] = parent
        return found

    def tensor(
        self, owner: nn.Module, name: str, shape: tuple[int, ...], *, dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> Tensor:
        """A weight or buffer, which must be plain, contiguous, on the CPU and of this shape and one of these dtypes."""
        found: Any = owner._parameters.get(name, owner._buffers.get(name))
        if type(found) not in (Tensor, nn.Parameter) or found.layout != torch.strided:
            raise SpecError(f"{name} is a {type(found).__name__}: the decode step in C needs a plain tensor")
        if found.device.type != "cpu" or found.dtype not in dtypes or not found.is_contiguous():
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise SpecError(f"{name} of {found.dtype} on {found.device}: must be contiguous {kinds} on the CPU")
        if found.shape != shape:
            raise SpecError(f"{name} has shape {tuple(found.shape)}: the spec says {shape}")
        self._owners[id(owner)] = owner
        weight: Tensor = found
        return weight

    def bias(self, owner: nn.Module, rows: int) -> Tensor | None:
        """A bias, or None where the module has none; one that appears later is noticed."""
        if owner._parameters.get("bias") is None and owner._buffers.get("bias") is None:
            return None
        return self.tensor(owner, "bias", (rows,))

    def settle(self) -> None:
        """From here on only weak references are held."""
        for parent in self._parents.values():
            self._modules += [child for child in parent._modules.values() if child is not None]
        index = {id(module): i for i, module in enumerate(self._modules)}
        self._containers = [index[parent] for parent in self._parents]
        self._refs: list[Callable[[], Any]] = [ref(module) for module in self._modules]
        self._tables: list[tuple[str, str, list[int]]] = []  # where weights of one name are
        self._absent: list[tuple[str, str, list[int]]] = []  # and where there is none
        for kind in ("_parameters", "_buffers"):
            for there, places in ((True, self._tables), (False, self._absent)):
                named: dict[str, list[int]] = {}
                for owner, module in self._owners.items():
                    for name, weight in getattr(module, kind).items():
                        if (weight is not None) == there:
                            named.setdefault(name, []).append(index[owner])
                places += [(kind, name, owners) for name, owners in named.items()]
        weights = _values(self._modules, self._tables)
        self._types, self._known = [*map(type, weights)], _signature(weights)
        self._modules, self._parents, self._owners = [], {}, {}

    @property
    def current(self) -> bool:
        """Whether every module and weight still is what was found, where it was found, and no hook has been added."""
        if any(self._hooks):
            return False
        modules = [reference() for reference in self._refs]
        try:
            weights, absent = _values(modules, self._tables), _values(modules, self._absent)
            children = [*chain.from_iterable([modules[i]._modules.values() for i in self._containers])]
        except (AttributeError, KeyError):  # a module is gone, so not where it was; a weight is
            return False
        return (
            len(children) == len(modules) - 1
            and all(map(is_, children, modules[1:]))
            and all(map(is_, absent, repeat(None)))
            and [*map(type, weights)] == self._types
            and _signature(weights) == self._known
        )


def _values(modules: list[Any], places: list[tuple[str, str, list[int]]]) -> list[Any]:
    """What some of the modules have under these names."""
    found: list[Any] = []
    for kind, name, owners in places:
        found += map(itemgetter(name), map(attrgetter(kind), map(modules.__getitem__, owners)))
    return found


def _signature(weights: list[Any]) -> tuple[list[int], list[torch.dtype]]:
    """What must not change while C holds the addresses."""
    return [*map(Tensor.data_ptr, weights)], [*map(_dtype, weights)]
