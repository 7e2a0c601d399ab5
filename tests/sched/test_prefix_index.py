"""Prefix hashes and the index of who holds which prefix, against plain comparisons of token lists."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.sched.prefix import PrefixIndex, prefix_hashes
from tandem.spec.errors import SpecError

prompts = st.lists(st.integers(0, 2), max_size=24)


def common(a: list[int], b: list[int], cell: int) -> int:
    """Full cells of which both begin."""
    count = 0
    while (end := (count + 1) * cell) <= min(len(a), len(b)) and a[:end] == b[:end]:
        count += 1
    return count


@given(a=prompts, b=prompts, cell=st.integers(1, 5))
@settings(max_examples=300)
def test_hashes_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int], cell: int) -> None:
    ha, hb = prefix_hashes(a, cell), prefix_hashes(tuple(b), cell)
    assert len(ha) == len(a) // cell
    assert [x == y for x, y in zip(ha, hb, strict=False)] == [n < common(a, b, cell) for n in range(min(len(ha), len(hb)))]


def test_hashes_are_64_bit_and_depend_on_the_cell() -> None:
    hashes = prefix_hashes(range(4000), 4)
    assert len(set(hashes)) == 1000
    assert max(hashes).bit_length() in (62, 63, 64)
    assert not set(hashes) & set(prefix_hashes(range(4000), 8))
    assert prefix_hashes([2**40, 1], 1) != prefix_hashes([1, 2**40], 1)


def test_another_process_has_the_same_hashes() -> None:
    code = "from tandem.sched.prefix import prefix_hashes; print(*prefix_hashes(range(10), 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert tuple(map(int, done.stdout.split())) == prefix_hashes(list(range(10)), 3)


def test_a_cell_has_at_least_one_token() -> None:
    with pytest.raises(SpecError, match=r"^cell=0: must be"):
        prefix_hashes([1], 0)


@given(notes=st.lists(st.tuples(st.sampled_from("abc"), prompts), max_size=12), forget=st.sampled_from("abcd"), prompt=prompts)
@settings(max_examples=300)
def test_matches_are_those_of_comparing_all_prompts(notes: list[tuple[str, list[int]]], forget: str, prompt: list[int]) -> None:
    index = PrefixIndex()
    for worker, ids in notes:
        index.note(worker, prefix_hashes(ids, 2))
    index.forget(forget)
    best = {w: max(common(ids, prompt, 2) for who, ids in notes if who == w) for w, _ in notes if w != forget}
    assert index.matched(prefix_hashes(prompt, 2)) == {worker: cells for worker, cells in best.items() if cells}


@given(notes=st.lists(st.tuples(st.sampled_from("abc"), prompts), max_size=20), most=st.integers(1, 8))
def test_the_index_never_grows_beyond_its_bound_and_never_invents(notes: list[tuple[str, list[int]]], most: int) -> None:
    index, whole = PrefixIndex(most), PrefixIndex()
    for worker, ids in notes:
        hashes = prefix_hashes(ids, 2)
        index.note(worker, hashes)
        whole.note(worker, hashes)
        assert len(index) <= most
        truth = whole.matched(hashes)
        assert all(truth.get(holder, 0) >= cells for holder, cells in index.matched(hashes).items())


def test_what_was_used_longest_ago_is_dropped_first_and_a_chain_from_its_end() -> None:
    a, b = prefix_hashes([1] * 6, 2), prefix_hashes([2] * 4, 2)
    index = PrefixIndex(4)
    index.note("w", a)
    index.note("w", b)
    assert index.matched(a) == {"w": 2}
    index.note("x", b[:1])
    assert index.matched(a) == {"w": 2}
    assert index.matched(b) == {"w": 1, "x": 1}


def test_cells_after_a_gap_are_of_no_use() -> None:
    hashes = prefix_hashes(range(8), 2)
    index = PrefixIndex()
    index.note("w", hashes[1:])
    assert index.matched(hashes) == {}
    index.note("x", hashes[:2])
    assert index.matched(hashes) == {"x": 2}
