"""States through Ray's object store and its tensor transport, with stand-ins for Ray's own calls."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import OwnerDiedError
from specs import any_models
from test_transfer import SMALL, put_all, random_state

from tandem.engine.transfer import StateLayout
from tandem.model.state import SequenceState
from tandem.serve.ray_states import RayObjectStates, RayReceipt, RayTensorStates
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import ModelSpec

CPU = torch.device("cpu")
States = RayObjectStates | RayTensorStates


class Store:
    """Ray's store: what is put is copied, arrays come back as read-only views."""

    def __init__(self) -> None:
        self.objects: list[Any] = []

    def put(self, what: Any) -> int:
        self.objects.append(what.clone() if isinstance(what, torch.Tensor) else what.tobytes())
        return len(self.objects) - 1

    def get(self, ref: int) -> Any:
        stored = self.objects[ref]
        if stored is None:
            raise OwnerDiedError("ref", None, "")
        return stored if isinstance(stored, torch.Tensor) else np.frombuffer(stored, np.uint8)


def objects(store: Store, max_bytes: int = 1 << 20) -> RayObjectStates:
    return RayObjectStates(max_bytes, put=store.put, get=store.get, clock=itertools.count().__next__)


def tensors(store: Store, max_bytes: int = 1 << 20) -> RayTensorStates:
    return RayTensorStates(max_bytes, CPU, put=store.put, get=store.get, clock=itertools.count().__next__)


WAYS = pytest.mark.parametrize("way", [objects, tensors])


def send(states: States, spec: ModelSpec, state: SequenceState, cuts: list[int] | None = None) -> RayReceipt:
    layer = next((layer for layer in state.layers if layer is not None), None)
    dtype = torch.float32 if layer is None else layer.tensors[0].dtype
    tokens = int(state.lengths[0])
    sink = states.sink(StateLayout(spec=spec, tokens=tokens, dtype=dtype))
    assert not isinstance(sink, Infeasible)
    put_all(sink, state, cuts or [0, tokens])  # type: ignore[arg-type]
    receipt = sink.close()
    assert isinstance(receipt, RayReceipt)
    return receipt


@WAYS
@settings(max_examples=30, deadline=None)
@given(any_models(), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 3), st.data())
def test_what_is_opened_is_what_was_put(
    way: Callable[[Store], States], spec: ModelSpec, tokens: int, dtype: torch.dtype, room: int, data: st.DataObject
) -> None:
    store = Store()
    sender, reader = way(store), way(store)
    sent = []
    for number in range(3):
        state = random_state(spec, tokens, dtype, room=room, seed=number)
        cut = data.draw(st.integers(1, tokens))
        sent.append((state, send(sender, spec, state, sorted({0, cut, tokens}))))
    for state, receipt in sent:  # memory of ours was used again meanwhile
        opened = reader.open(pickle.loads(pickle.dumps(receipt)), spec)
        assert opened.state.to_bytes() == state.to_bytes()
        assert opened.nbytes == receipt.nbytes == state.nbytes
        opened.release()
    send(reader, spec, state)
    for end in (reader, sender):
        for _, receipt in sent:
            end.release(receipt)
        assert (reader.pending, sender.pending) == (1, 3 if end is reader else 0)
    sender.close()
    reader.close()


@WAYS
def test_what_waits_to_be_fetched_is_bounded(way: Callable[[Store, int], States]) -> None:
    state = random_state(SMALL, 100)
    states = way(Store(), 2 * state.nbytes)
    first, second = send(states, SMALL, state), send(states, SMALL, state)
    layout = StateLayout(spec=SMALL, tokens=100)
    refused = states.sink(layout)
    assert isinstance(refused, Infeasible)
    assert "2 states wait to be fetched" in refused.reason
    states.release(first)
    states.release(first)
    assert states.pending == 1
    sink = states.sink(layout)
    assert not isinstance(sink, Infeasible)
    sink.abort()
    assert states.pending == 1
    states.release(second)
    with pytest.raises(SpecError, match="one state of 400 tokens takes"):
        states.sink(StateLayout(spec=SMALL, tokens=400))
    assert states.pending == 0


@WAYS
def test_an_incomplete_state_is_refused_and_frees_its_room(way: Callable[[Store], States]) -> None:
    state, states = random_state(SMALL, 9), way(Store())
    sink = states.sink(StateLayout(spec=SMALL, tokens=9))
    assert not isinstance(sink, Infeasible)
    for number, layer in enumerate(state.layers):
        sink.put(number, layer, 0, 5, final=False)
    with pytest.raises(SpecError, match="9 were laid out"):
        sink.close()
    sink.abort()
    assert states.pending == 0


@WAYS
def test_states_that_are_gone_or_not_what_was_sent_are_one_line(way: Callable[[Store], States]) -> None:
    store = Store()
    states, state = way(store), random_state(SMALL, 9)
    receipt = send(states, SMALL, state)
    with pytest.raises(SpecError, match="is of another model than other"):
        states.open(receipt, replace(SMALL, layers=SMALL.layers[:3], name="other"))
    short = store.put(states._get(receipt.ref)[:-4])
    with pytest.raises(SpecError, match="its bytes are not"):
        states.open(replace(receipt, ref=short), SMALL)
    store.objects[receipt.ref] = None
    with pytest.raises(SpecError, match=r"^state of 9 tokens: cannot be fetched \(OwnerDiedError\)$"):
        states.open(receipt, SMALL)


def test_damage_on_the_way_through_the_object_store_is_found() -> None:
    store = Store()
    states = objects(store)
    receipt = send(states, SMALL, random_state(SMALL, 9))
    raw = bytearray(store.objects[receipt.ref])
    raw[len(raw) // 2] ^= 1
    store.objects[receipt.ref] = bytes(raw)
    with pytest.raises(SpecError, match="damaged; send the state again"):
        states.open(receipt, SMALL)
    with pytest.raises(SpecError, match="has no checksum"):
        states.open(replace(receipt, checksums=None), SMALL)


def test_memory_that_was_used_is_used_again() -> None:
    states = objects(Store())
    for tokens in (50, 40, 90, 90, 1):
        states.release(send(states, SMALL, random_state(SMALL, tokens)))
    assert [len(buffer) for buffer in states._free] == [1 << 16]
    sinks = [states.sink(StateLayout(spec=SMALL, tokens=9)) for _ in range(2)]
    for sink in sinks:
        assert not isinstance(sink, Infeasible)
        sink.abort()
        sink.abort()
    assert [len(buffer) for buffer in states._free] == [1 << 16, 1 << 16]


def test_what_ray_gave_stays_as_long_as_the_state_and_no_longer() -> None:
    store = Store()
    states = objects(store)
    receipt = send(states, SMALL, random_state(SMALL, 9))
    given: list[weakref.ref[np.ndarray]] = []

    def get(ref: int) -> np.ndarray:
        array = store.get(ref)
        given.append(weakref.ref(array))
        return array

    states._get = get
    opened = states.open(receipt, SMALL)
    gc.collect()
    assert given[0]() is not None
    del opened
    gc.collect()
    assert given[0]() is None
