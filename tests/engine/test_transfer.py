"""Layout of a state in flat bytes, and copies into it: equal to the state itself, whatever the passes."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import any_models

from tandem.engine.transfer import DTYPES, StateLayout, StateWriter, verify
from tandem.model.state import AttentionState, SequenceState
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

DTYPE = st.sampled_from(list(DTYPES.values()))
ATTENTION = Attention(num_heads=2, num_kv_heads=2, head_dim=4)
MAMBA = Mamba2(num_heads=3, head_dim=2, state_dim=5, groups=1, conv_kernel=4, conv_bias=True, proj_bias=False)
SMALL = ModelSpec(
    name="small", vocab_size=9, hidden_size=6, layers=(MAMBA, MLP(ffn_size=4, gated=True), ATTENTION, MAMBA), max_context=64
)


def random_state(
    spec: ModelSpec, tokens: int, dtype: torch.dtype = torch.float32, *, room: int = 0, seed: int = 0
) -> SequenceState:
    """Random bits that are numbers, also in slots beyond the last token."""
    state = SequenceState.zeros(spec, 1, capacity=tokens + room, dtype=dtype)
    state.lengths[:] = tokens
    random = torch.Generator().manual_seed(seed)
    for layer in state.layers:
        for tensor in layer.tensors if layer is not None else ():
            tensor.copy_(torch.randn(tensor.shape, generator=random))
    return state


def put_all(writer: StateWriter, state: SequenceState, cuts: list[int]) -> None:
    for begin, end in itertools.pairwise(cuts):
        for number, layer in enumerate(state.layers):
            writer.put(number, layer, begin, end, final=end == cuts[-1])


def written(state: SequenceState, layout: StateLayout, cuts: list[int]) -> tuple[np.ndarray, StateWriter]:
    buffer = np.full(layout.nbytes, 0xA5, np.uint8)
    writer = StateWriter(layout, buffer, clock=itertools.count().__next__)
    put_all(writer, state, cuts)
    return buffer, writer


@settings(max_examples=60, deadline=None)
@given(any_models(), st.integers(1, 40), DTYPE)
def test_a_layout_is_the_state_and_the_formula(spec: ModelSpec, tokens: int, dtype: torch.dtype) -> None:
    layout = StateLayout(spec=spec, tokens=tokens, dtype=dtype)
    assert layout.nbytes == random_state(spec, tokens, dtype, room=3).nbytes
    name = layout.dtype_name
    assert layout.nbytes == spec.state_bytes_per_sequence(activations=name) + tokens * spec.kv_bytes_per_token(kv=name)


@settings(max_examples=60, deadline=None)
@given(any_models(), st.integers(1, 40), DTYPE)
def test_regions_lie_side_by_side_and_aligned(spec: ModelSpec, tokens: int, dtype: torch.dtype) -> None:
    layout = StateLayout(spec=spec, tokens=tokens, dtype=dtype)
    regions = sorted((r for pair in layout.layers if pair for r in pair), key=lambda r: (r.offset, r.nbytes))
    at = 0
    for region in regions:
        assert region.offset == at
        assert region.offset % region.dtype.itemsize == 0
        at += region.nbytes
    assert at == layout.nbytes


@settings(max_examples=60, deadline=None)
@given(any_models(), st.integers(1, 40), DTYPE, st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
def test_any_passes_write_the_state_bit_for_bit(spec, tokens, dtype, room, random, threaded) -> None:
    state = random_state(spec, tokens, dtype, room=room)
    layout = StateLayout(spec=spec, tokens=tokens, dtype=dtype)
    cuts = [0, *sorted(random.sample(range(1, tokens), random.randint(0, tokens - 1))), tokens]
    buffer = np.full(layout.nbytes, 0xA5, np.uint8)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as executor:
        patch.setattr("tandem.engine.transfer._INLINE_BYTES", 0)
        patch.setattr("tandem.engine.transfer.PIECE_BYTES", random.choice([8, 64, 1 << 18]))
        writer = StateWriter(layout, buffer, clock=itertools.count().__next__, executor=executor if threaded else None)
        put_all(writer, state, cuts)
        result = writer.finish()
    assert layout.state(buffer.data).to_bytes() == state.to_bytes()
    verify(layout, buffer, result.checksums)  # pieces of another size give the same sums
    assert 0 <= result.hidden_s <= result.seconds
    assert threaded or result.hidden_s == 0


@settings(max_examples=60, deadline=None)
@given(any_models(), st.integers(1, 20), DTYPE, st.data())
def test_one_changed_bit_anywhere_is_found(spec: ModelSpec, tokens: int, dtype: torch.dtype, data: st.DataObject) -> None:
    layout = StateLayout(spec=spec, tokens=tokens, dtype=dtype)
    if not layout.nbytes:
        return
    middle = data.draw(st.integers(0, tokens))
    buffer, writer = written(random_state(spec, tokens, dtype), layout, sorted({0, middle, tokens}))
    checksums = writer.finish().checksums
    verify(layout, buffer, checksums)
    buffer[data.draw(st.integers(0, layout.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SpecError, match="damaged; send the state again"):
        verify(layout, buffer, checksums)


def test_every_checksum_is_needed_and_none_fits_twice() -> None:
    layout = StateLayout(spec=SMALL, tokens=7)
    buffer, writer = written(random_state(SMALL, 7), layout, [0, 3, 7])
    checksums = writer.finish().checksums
    assert [(c.layer, c.begin, c.end) for c in checksums] == [(0, 0, 7), (2, 0, 3), (2, 3, 7), (3, 0, 7)]
    for i, check in enumerate(checksums):
        with pytest.raises(SpecError):
            verify(layout, buffer, checksums[:i] + checksums[i + 1 :])
        with pytest.raises(SpecError, match="no such part"):
            verify(layout, buffer, (*checksums, check))
    with pytest.raises(SpecError, match="no such part"):
        verify(layout, buffer, (replace(checksums[0], layer=1), *checksums[1:]))
    with pytest.raises(SpecError, match="no such part"):
        verify(layout, buffer, (replace(checksums[0], layer=4), *checksums[1:]))


def test_parts_that_are_missing_or_come_twice_are_refused() -> None:
    layout = StateLayout(spec=SMALL, tokens=6)
    state = random_state(SMALL, 6)

    def writer() -> StateWriter:
        return StateWriter(layout, np.zeros(layout.nbytes, np.uint8), clock=itertools.count().__next__)

    for skipped in (0, 2, 3):
        one = writer()
        for number, layer in enumerate(state.layers):
            if number != skipped:
                one.put(number, layer, 0, 6, final=True)
        with pytest.raises(SpecError, match=f"layer {skipped} ends at token 0: 6 were laid out"):
            one.finish()
    one = writer()
    one.put(2, state.layers[2], 0, 4, final=False)
    for begin, end, final in ((0, 4, False), (5, 6, True), (4, 7, True), (4, 5, True)):
        with pytest.raises(SpecError, match="must go on from 4 and end at 6"):
            one.put(2, state.layers[2], begin, end, final=final)
    one.put(0, state.layers[0], 4, 6, final=True)
    with pytest.raises(SpecError, match="must go on from 6"):
        one.put(0, state.layers[0], 4, 6, final=True)


def test_a_state_of_another_shape_or_dtype_is_refused() -> None:
    layout = StateLayout(spec=SMALL, tokens=6)
    writer = StateWriter(layout, np.zeros(layout.nbytes, np.uint8), clock=itertools.count().__next__)
    half = random_state(SMALL, 6, torch.bfloat16).layers[2]
    with pytest.raises(SpecError, match=r"layer 2 is 2-byte \[2, 6, 4\]: 4-byte \[2, 6, 4\] was laid out"):
        writer.put(2, half, 0, 6, final=True)
    short = random_state(SMALL, 4).layers[2]
    with pytest.raises(SpecError, match=r"layer 2 is 4-byte \[2, 4, 4\]: 4-byte \[2, 6, 4\] was laid out"):
        writer.put(2, short, 0, 6, final=True)


def test_what_is_put_first_may_grow_before_the_copies_end() -> None:
    """`reserve` replaces an attention layer's tensors between passes; the copies of earlier tokens read the old ones."""
    layout = StateLayout(spec=SMALL, tokens=6)
    state = random_state(SMALL, 4)
    buffer = np.zeros(layout.nbytes, np.uint8)
    with ThreadPoolExecutor(1) as executor, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.engine.transfer._INLINE_BYTES", 0)
        writer = StateWriter(layout, buffer, clock=itertools.count().__next__, executor=executor)
        writer.put(2, state.layers[2], 0, 4, final=False)
        state.reserve(6)
        attention = state.layers[2]
        assert isinstance(attention, AttentionState)
        attention.keys[:, :, 4:] = 1
        state.lengths[:] = 6
        for number, layer in enumerate(state.layers):
            writer.put(number, layer, 4, 6, final=True)
        writer.finish()
    assert layout.state(buffer.data).to_bytes() == state.slice([0]).to_bytes()


class Later(Executor):
    """Does what it is given only when the result is asked for."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        return SimpleNamespace(result=lambda: fn(*args, **kwargs))


def test_copies_that_are_waited_for_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.transfer._INLINE_BYTES", 0)
    layout = StateLayout(spec=SMALL, tokens=6)
    clock = itertools.count().__next__
    writer = StateWriter(layout, np.zeros(layout.nbytes, np.uint8), clock=clock, executor=Later())
    put_all(writer, random_state(SMALL, 6), [0, 3, 6])
    result = writer.finish()
    assert result.seconds >= 4
    assert result.hidden_s == 0


def test_stopping_waits_for_the_copy_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.transfer._INLINE_BYTES", 0)
    layout = StateLayout(spec=SMALL, tokens=6)
    runs, may_end = threading.Event(), threading.Event()

    def clock() -> float:  # the copy that runs asks for the time
        runs.set()
        assert may_end.wait(60)
        return 0.0

    with ThreadPoolExecutor(1) as executor:
        writer = StateWriter(layout, np.zeros(layout.nbytes, np.uint8), clock=clock, executor=executor)
        put_all(writer, random_state(SMALL, 6), [0, 6])
        assert runs.wait(60)
        stopping = threading.Thread(target=writer.stop)
        stopping.start()
        stopping.join(0.2)
        assert stopping.is_alive()
        may_end.set()
        stopping.join(60)
        assert not stopping.is_alive()
    assert [copy.cancelled() for copy in writer._copies] == [False, True, True]


def test_tensors_of_inference_mode_and_with_strides_are_written() -> None:
    layout = StateLayout(spec=SMALL, tokens=6)
    with torch.inference_mode():
        state = random_state(SMALL, 6)
    for number in (0, 3):
        layer = state.layers[number]
        layer.conv = layer.conv.transpose(1, 2).contiguous().transpose(1, 2)  # as a convolution over time leaves it
    buffer, writer = written(state, layout, [0, 6])
    writer.finish()
    assert layout.state(buffer.data).to_bytes() == state.to_bytes()


def test_keys_are_equal_where_bytes_can_be_read() -> None:
    layout = StateLayout(spec=SMALL, tokens=6)
    assert layout.key == StateLayout(spec=SMALL.renamed("other"), tokens=6).key
    wider = replace(SMALL, layers=(MAMBA, ATTENTION, replace(MAMBA, state_dim=6)))
    others = [
        StateLayout(spec=SMALL, tokens=7),
        StateLayout(spec=SMALL, tokens=6, dtype=torch.bfloat16),
        StateLayout(spec=wider, tokens=6),
    ]
    assert len({layout.key, *(other.key for other in others)}) == 4
    assert StateLayout(spec=SMALL, tokens=6, dtype=torch.float16).key != others[1].key


@pytest.mark.parametrize(("fields", "text"), [({"tokens": 0}, "tokens=0"), ({"dtype": torch.int8}, "dtype=torch.int8")])
def test_a_layout_that_cannot_be_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        StateLayout(**{"spec": SMALL, "tokens": 6, **fields})  # type: ignore[arg-type]
