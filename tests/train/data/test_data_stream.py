"""The token stream against brute force: blend, phases, packing, labels, and going on at any number of ranks.

In the shards here token `1000 * d + j` is the j-th of document d, so every position of a batch says where it came from.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.train.data.blend import Blend
from tandem.train.data.packing import IGNORED, Batch, Packer, new_batch
from tandem.train.data.shards import Shard, read_shard
from tandem.train.data.stream import TokenStream, source_folder
from tandem.train.recipe import BatchPart, DataPart, PhasePart, SourcePart

LENGTH = 32


def _shard(documents: list[tuple[int, int]], first: int = 1) -> Shard:
    """Documents of (length, prompt tokens); their numbers count from `first`, so no token is 0."""
    tokens = [1000 * (first + d) + j for d, (length, _) in enumerate(documents) for j in range(length)]
    starts = np.cumsum([0, *(length for length, _ in documents)])[:-1]
    table = [(start, length, prompt) for start, (length, prompt) in zip(starts.tolist(), documents, strict=True)]
    return Shard(tokens=np.array(tokens, dtype="<u4"), documents=np.array(table, dtype=np.int64).reshape(-1, 3))


def _write(folder: Path, train: Shard, held_out: Shard) -> None:
    folder.mkdir(parents=True)
    tokens = np.concatenate([train.tokens, held_out.tokens])
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "train.npy", train.documents)
    np.save(folder / "held_out.npy", held_out.documents + np.array([len(train.tokens), 0, 0]))
    (folder / "shard.json").write_text(json.dumps({"dtype": "<u4", "tokens": len(tokens)}), encoding="utf-8")


SOURCES = {
    "short": [(3 + 7 * i % 11, 1 + i % 3) for i in range(40)],
    "long": [(50 + 13 * i, 20 * (i % 2)) for i in range(6)],
    "prose": [(41 + i, 1) for i in range(9)],
}
FIRST = {"short": 1, "long": 101, "prose": 201}
DATA = DataPart(
    sources={name: SourcePart(kind="text") for name in SOURCES},
    phases=(
        PhasePart(until=0.6, weights={"short": 1.0, "long": 1.0, "prose": 2.0}),
        PhasePart(until=0.9, weights={"short": 0.7, "long": 0.3}),
        PhasePart(until=1.0, weights={"short": 3.0, "prose": 1.0, "long": 0.0}),
    ),
    cut=("prose",),
)
BATCH = BatchPart(sequence_length=LENGTH, sequences=12, tokens=LENGTH * 12 * 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, documents in SOURCES.items():
        held_out = _shard([(20, 3)] * 7, first=FIRST[name] + 50)
        _write(source_folder(folder, name), _shard(documents, FIRST[name]), held_out)
    return folder


def _stream(folder: Path, seed: int = 0) -> TokenStream:
    return TokenStream(folder, DATA, BATCH, seed=seed)


def _documents() -> dict[int, tuple[int, int]]:
    return {FIRST[name] + d: pair for name, pairs in SOURCES.items() for d, pair in enumerate(pairs)}


def _source_of(row: np.ndarray) -> str:
    document = int(row[0]) // 1000
    return max((name for name in FIRST if FIRST[name] <= document), key=lambda name: FIRST[name])


def _check(batch: Batch, documents: dict[int, tuple[int, int]]) -> None:
    """Each position's label and document number, worked out one by one."""
    for ids, labels, numbers in zip(batch.input_ids.tolist(), batch.labels.tolist(), batch.documents.tolist(), strict=True):
        number = 0
        for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
            before = ids[at - 1] if at else None
            if before is not None and token != before + 1 and not (token == before == 0):
                number += 1
            assert numbers[at] == number
            if token == 0:
                assert label == IGNORED
                continue
            length, prompt = documents[token // 1000]
            following = token % 1000 + 1
            learned = following < length and following >= prompt
            assert label == (token + 1 if learned else IGNORED), (ids, at)


def _rows(folder: Path, steps: int, world: int, seed: int = 0) -> list[Batch]:
    """Steps put together from all ranks."""
    streams = [_stream(folder, seed) for _ in range(world)]
    return [_joined([stream.batch(rank, world) for rank, stream in enumerate(streams)]) for _ in range(steps)]


def _joined(parts: list[Batch]) -> Batch:
    world = len(parts)
    whole = new_batch(BATCH.sequences, LENGTH)
    for rank, part in enumerate(parts):
        for name in ("input_ids", "labels", "documents"):
            getattr(whole, name)[rank::world] = getattr(part, name)
    return whole


def _equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "documents"))


def test_labels_and_document_numbers_are_brute_force(folder: Path) -> None:
    stream = _stream(folder)
    for _ in range(BATCH.steps + 3):
        batch = stream.batch()
        assert batch.input_ids.shape == (12, LENGTH)
        assert {array.dtype for array in (batch.input_ids, batch.labels, batch.documents)} == {np.dtype(np.int64)}
        assert batch.learned == (batch.labels != IGNORED).sum()
        _check(batch, _documents())


def test_the_order_of_sources_is_the_blend_and_phases_switch_exactly(folder: Path) -> None:
    stream = _stream(folder)
    total = BATCH.steps * BATCH.sequences
    phases, drawn = [], []
    for _ in range(BATCH.steps):
        phases.append(stream.phase)
        drawn += [_source_of(row) for row in stream.batch().input_ids]
    assert phases == [0] * 12 + [1] * 6 + [2] * 2
    bounds = (0, round(0.6 * total), round(0.9 * total), total)
    for phase, (start, end) in zip(DATA.phases, pairwise(bounds), strict=True):
        shares = {name: weight / sum(phase.weights.values()) for name, weight in phase.weights.items()}
        for at in range(start, end + 1):
            count = Counter(drawn[start:at])
            assert all(abs(count[name] - share * (at - start)) < 1 for name, share in shares.items())
    assert "prose" not in drawn[bounds[1] : bounds[2]]
    assert "long" not in drawn[bounds[2] :]


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0.01, 10)), min_size=1, max_size=7).filter(any),
    total=st.integers(1, 400),
)
@settings(max_examples=150)
def test_shares_are_exact_to_one_sequence_at_any_moment_and_to_two_over_any_window(weights: list[float], total: int) -> None:
    names = [f"s{i}" for i in range(len(weights))]
    blend = Blend([PhasePart(until=1.0, weights=dict(zip(names, weights, strict=True)))], names, total)
    drawn = np.zeros((total + 1, len(names)))
    for n in range(total):
        drawn[n + 1] = drawn[n]
        drawn[n + 1, blend.next()] += 1
    off = drawn - np.arange(total + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(off).max() < 1 + 1e-9
    assert (off.max(axis=0) - off.min(axis=0)).max() < 2
    assert blend.phase == 0


@given(ends=st.lists(st.integers(1, 99), min_size=0, max_size=3, unique=True), total=st.integers(1, 60))
def test_each_phase_ends_at_its_sequence(ends: list[int], total: int) -> None:
    """The phase of sequence i is the first that ends after it, by a rule of its own: rounding halves up."""
    until = [*(end / 100 for end in sorted(ends)), 1.0]
    names = [f"s{i}" for i in range(len(until))]
    phases = [PhasePart(until=u, weights={name: 1.0}) for u, name in zip(until, names, strict=True)]
    blend = Blend(phases, names, total)
    for at in range(total + 5):
        expected = next((i for i, u in enumerate(until) if at < int(u * total + 0.5)), len(until) - 1)
        assert blend.phase == expected
        assert blend.next() == expected


@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_ranks_together_have_the_rows_of_one(folder: Path, world: int) -> None:
    for one, many in zip(_rows(folder, 6, 1), _rows(folder, 6, world), strict=True):
        assert _equal(one, many)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (4, 1), (1, 12)])
@pytest.mark.parametrize("at", [0, 1, 7, 13])
def test_going_on_at_another_number_of_ranks_is_exact(folder: Path, before: int, after: int, at: int) -> None:
    expected = _rows(folder, at + 4, 1)
    old = [_stream(folder) for _ in range(before)]
    for _ in range(at):
        for rank, stream in enumerate(old):
            stream.batch(rank, before)
    states = [stream.state() for stream in old]
    assert all(state == states[0] for state in states)
    state = json.loads(json.dumps(states[0]))
    new = [_stream(folder) for _ in range(after)]
    for stream in new:
        stream.batch()
        stream.restore(state)
    for step in range(at, at + 4):
        assert _equal(expected[step], _joined([stream.batch(rank, after) for rank, stream in enumerate(new)]))
    assert new[0].step == at + 4
    assert new[0].tokens() == _after(folder, at + 4).tokens()


def _after(folder: Path, steps: int) -> TokenStream:
    stream = _stream(folder)
    for _ in range(steps):
        stream.batch()
    return stream


def test_seeds_change_the_order_and_nothing_else_does(folder: Path) -> None:
    assert all(_equal(a, b) for a, b in zip(_rows(folder, 3, 1), _rows(folder, 3, 1), strict=True))
    assert not _equal(_rows(folder, 1, 1, seed=1)[0], _rows(folder, 1, 1)[0])


def test_tokens_and_padding_are_counted(folder: Path) -> None:
    stream = _stream(folder)
    assert stream.padding() == 0.0
    seen: Counter[str] = Counter()
    padding = 0
    for _ in range(BATCH.steps):
        for row in stream.batch().input_ids:
            seen[_source_of(row)] += int((row > 0).sum())
            padding += int((row == 0).sum())
    assert stream.tokens() == dict(seen)
    assert stream.padding() == pytest.approx(padding / (BATCH.steps * BATCH.tokens_per_step))
    assert 0 < stream.padding() < 0.2


DOCUMENTS = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 95)), min_size=1, max_size=60)


@given(pairs=DOCUMENTS, cut=st.booleans(), seed=st.integers(0, 5))
@settings(max_examples=60)
def test_packing_takes_each_document_once_an_epoch_in_order_and_whole(
    pairs: list[tuple[int, int]], cut: bool, seed: int
) -> None:
    shard = _shard(pairs)
    packer = Packer(shard, name="s", length=LENGTH, cut=cut, seed=seed)
    taken: list[tuple[int, int, int]] = []
    total = sum(length for length, _ in pairs)
    batch = new_batch(2 * total // LENGTH + 2 * len(pairs) + 2, LENGTH)
    rows = []
    for row in range(len(batch.input_ids)):
        pieces = packer.next()
        packer.fill(pieces, batch, row)
        taken += pieces
        rows.append(pieces)
    _check(batch, {1 + d: pair for d, pair in enumerate(pairs)})
    starts = [document for document, offset, _ in taken if offset == 0]
    for epoch in range(len(starts) // len(pairs)):
        some = starts[epoch * len(pairs) : (epoch + 1) * len(pairs)]
        assert sorted(some) == list(range(len(pairs)))
        if cut:
            expected = np.random.default_rng((seed, zlib.crc32(b"s"), epoch)).permutation(len(pairs))
            assert some == expected.tolist()
    assert len(starts) >= len(pairs)
    for pieces in rows:
        size = sum(take for _, _, take in pieces)
        assert size == LENGTH if cut else 0 < size <= LENGTH
        if not cut:
            assert all(take == min(LENGTH, pairs[d][0] - offset) and offset % LENGTH == 0 for d, offset, take in pieces)
    assert packer.tokens == sum(take for _, _, take in taken)


@given(pairs=DOCUMENTS)
def test_once_takes_every_document_exactly_once(pairs: list[tuple[int, int]]) -> None:
    packer = Packer(_shard(pairs), name="s", length=LENGTH, cut=False, seed=0, once=True)
    covered: Counter[int] = Counter()
    while not packer.ended:
        for document, offset, take in packer.next():
            covered.update(1000 * document + offset + i for i in range(take))
    assert covered == Counter(1000 * d + j for d, (length, _) in enumerate(pairs) for j in range(length))
    assert packer.next() == []


@given(pairs=DOCUMENTS)
def test_padding_only_where_nothing_in_line_fits(pairs: list[tuple[int, int]]) -> None:
    packer = Packer(_shard(pairs), name="s", length=LENGTH, cut=False, seed=0)
    for _ in range(20):
        waiting = packer.state()["line"][0]
        pieces = packer.next()
        assert list(pieces[0][:2]) == waiting
        room = LENGTH - sum(take for _, _, take in pieces)
        assert all(min(LENGTH, pairs[document][0] - offset) > room for document, offset in packer.state()["line"])


def test_held_out_batches_are_the_held_out_documents(folder: Path) -> None:
    for name in SOURCES:
        stream = _stream(folder)
        first = stream.held_out(name, 8, 2)
        assert all(_equal(a, b) for a, b in zip(first, _stream(folder, seed=5).held_out(name, 8, 2), strict=True))
        assert stream.state() == _stream(folder).state()
        tokens = [token for batch in first for token in batch.input_ids.ravel().tolist() if token]
        held_out = range(FIRST[name] + 50, FIRST[name] + 57)
        assert sorted(tokens) == [1000 * d + j for d in held_out for j in range(20)]
        for batch in first:
            assert batch.input_ids.shape == (2, LENGTH)
            _check(batch, dict.fromkeys(held_out, (20, 3)))
        assert len(stream.held_out(name, 1, 2)) == 1
    with pytest.raises(SpecError, match="source='none': not in the recipe; short, long, prose"):
        _stream(folder).held_out("none", 1, 1)


def test_held_out_as_a_stream_of_its_own(folder: Path) -> None:
    batch = TokenStream(folder, DATA, BATCH, seed=0, part="held_out").batch()
    assert all(51 <= token // 1000 % 100 < 58 for token in batch.input_ids.ravel().tolist() if token)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    stream = _stream(folder)
    with pytest.raises(SpecError, match="multiple of the 5 ranks"):
        stream.batch(0, 5)
    with pytest.raises(SpecError, match="count from 0"):
        stream.batch(2, 2)
    state = stream.state()
    state["sources"] = {"other": state["sources"]["short"]}
    with pytest.raises(SpecError, match="the checkpoint was made with"):
        stream.restore(state)
    with pytest.raises(SpecError, match="prepare the data again"):
        TokenStream(tmp_path, DATA, BATCH, seed=0)
    empty = _shard([])
    for name in SOURCES:
        _write(source_folder(tmp_path, name), empty, empty)
    with pytest.raises(SpecError, match="no documents left"):
        TokenStream(tmp_path, DATA, BATCH, seed=0)


def test_a_shard_of_which_a_part_is_gone(folder: Path, tmp_path: Path) -> None:
    _write(tmp_path / "s", _shard([(5, 1)]), _shard([(5, 1)]))
    assert read_shard(tmp_path / "s", "held_out").documents.tolist() == [[5, 5, 1]]
    with (tmp_path / "s" / "tokens.bin").open("ab") as stream:
        stream.truncate(8)
    with pytest.raises(SpecError, match="does not have 10 tokens"):
        read_shard(tmp_path / "s", "train")
