from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, small_model

from tandem.engine.cache import BlockPool, PagedState
from tandem.engine.config import CacheSize, EngineConfig, size_cache
from tandem.engine.memory import Memory
from tandem.engine.prefix import PrefixCache
from tandem.model.hybrid import Decoder
from tandem.perf.memory import inspect_model
from tandem.spec.errors import SpecError

CONFIG = EngineConfig(max_batch=6, pass_tokens=8, step_tokens=64, block_size=4, cache_bytes=200_000, prefix_cache_bytes=50_000)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors_and_of_the_planner(kind: str) -> None:
    spec = small_model(kind).spec
    size = size_cache(spec, CONFIG, torch.float32, free_bytes=0)
    paged = PagedState(spec, size, CONFIG.block_size, torch.float32, torch.device("cpu"))
    assert paged.nbytes == size.total_bytes <= 200_000
    assert size.block_bytes == spec.kv_bytes(CONFIG.block_size, kv="fp32")
    bf16 = PagedState(spec, size_cache(spec, CONFIG, torch.bfloat16, free_bytes=0), 4, torch.bfloat16, torch.device("cpu"))
    held = inspect_model(spec, context=4, batch=1)
    size = size_cache(spec, CONFIG, torch.bfloat16, free_bytes=0)
    assert bf16.nbytes == size.total_bytes
    assert (size.block_bytes, size.slot_bytes) == (held["kv_bytes"], held["state_bytes"])


def test_sizes_take_what_is_free_and_no_more_than_the_batch_can_fill() -> None:
    spec = small_model("transformer").spec
    quarter = size_cache(spec, replace(CONFIG, cache_bytes=None), torch.float32, free_bytes=400_000)
    assert 100_000 - quarter.block_bytes < quarter.total_bytes <= 100_000
    most = size_cache(spec, replace(CONFIG, cache_bytes=1 << 40), torch.float32, free_bytes=0)
    assert most.num_blocks == 6 * 512 // 4
    with pytest.raises(SpecError, match="cache_bytes=1,000: 6 requests need"):
        size_cache(spec, replace(CONFIG, cache_bytes=1000), torch.float32, free_bytes=0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_blocks_are_free_or_held(steps: list[tuple[int, int, int]]) -> None:
    pool = BlockPool(12)
    held: list[list[int]] = []
    kept: list[tuple[int, ...]] = []
    for action, count, which in steps:
        if action == 0 and count <= pool.free:
            held.append(pool.take(count))
        elif action == 1 and held:
            pool.drop(held.pop(which % len(held)))
        elif action == 2 and held:
            blocks = held[which % len(held)]
            if not any(b in cell for b in blocks for cell in kept):
                pool.keep(blocks)
                kept.append(tuple(blocks))
        elif action == 3 and kept:
            pool.forget(kept.pop(which % len(kept)))
        elif action == 4 and kept:
            blocks = list(kept[which % len(kept)])
            pool.hold(blocks)
            held.append(blocks)
        pool.check(held, kept)
        only = {b for cell in kept for b in cell} - {b for blocks in held for b in blocks}
        assert pool.only_kept == len(only)
    with pytest.raises(RuntimeError):
        pool.take(pool.free + 1)


def test_a_leak_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2)
    with pytest.raises(RuntimeError, match="other holders"):
        pool.check([], [])
    pool.drop(blocks)
    pool.check([], [])
    with pytest.raises(RuntimeError, match="nobody holds"):
        pool.drop(blocks)
    with pytest.raises(RuntimeError, match="no holder"):
        pool.hold(blocks)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return small_model(request.param)


def fresh(model: Decoder) -> Memory:
    size = size_cache(model.spec, CONFIG, torch.float32, free_bytes=0)
    return Memory(model.spec, size, CONFIG, max_context=512, dtype=torch.float32, device=model.device)


@given(length=st.integers(1, 60), cuts=st.lists(st.integers(1, 7), max_size=5))
@settings(deadline=None, max_examples=25)
def test_what_is_written_is_read(model: Decoder, length: int, cuts: list[int]) -> None:
    memory = fresh(model)
    other = memory.take_slot()
    memory.reach(other, 7)
    _, state = model.prefill(torch.randint(3, 259, (1, length)))
    slot = memory.take_slot()
    memory.reach(slot, length)
    edges = sorted({0, length, *(4 * cut for cut in cuts if 4 * cut < length)})
    for begin, end in itertools.pairwise(edges):
        memory.write(slot, state, begin, end)
    memory.paged.write_slot(state, slot)
    found = model.new_state(1, capacity=length)
    memory.read(slot, found, length)
    assert found.to_bytes() == state.to_bytes()
    memory.check([other, slot])
    memory.drop(slot)
    memory.drop(other)
    memory.check([])


def test_the_least_recently_used_prefix_goes_first_from_its_end() -> None:
    size = CacheSize(num_blocks=40, num_slots=2, block_bytes=100, slot_bytes=0, prefix_bytes=1000)
    pool = BlockPool(40)
    cache = PrefixCache(pool, size, blocks_per_cell=2)
    chains = {"a": (1, 2, 3), "b": (11, 12)}
    for hashes in chains.values():
        blocks = pool.take(2 * len(hashes))
        for cell in range(1, len(hashes) + 1):
            cache.put(hashes, cell, blocks, None)
        pool.drop(blocks)
    assert (len(cache), cache.nbytes, pool.only_kept) == (5, 1000, 10)
    assert cache.match(chains["a"]).usable == 3  # now b is the older one
    blocks = pool.take(2)
    cache.put((21,), 1, blocks, None)
    pool.drop(blocks)
    assert (cache.match(chains["b"]).usable, cache.match(chains["a"]).usable) == (1, 3)
    in_use = cache.match(chains["a"])
    pool.hold(in_use.blocks)
    cache.give_back(40)
    assert cache.match(chains["a"]).usable == 3
    assert cache.match(chains["b"]).usable == 0
    pool.check([in_use.blocks], cache.blocks())
    pool.drop(in_use.blocks)
    cache.clear()
    assert (len(cache), cache.nbytes, pool.free) == (0, 0, 40)


def test_snapshots_are_where_prompts_end_or_part() -> None:
    big = CacheSize(num_blocks=40, num_slots=2, block_bytes=100, slot_bytes=10**6, prefix_bytes=10**8)
    cache = PrefixCache(BlockPool(40), big, blocks_per_cell=2)
    assert [cell for cell in range(1, 8) if cache.wants_snapshot(cell, 7, 3)] == [3, 7]
    small = replace(big, slot_bytes=200)
    assert PrefixCache(BlockPool(40), small, blocks_per_cell=2).wants_snapshot(5, 7, 3)
    attention_only = replace(big, slot_bytes=0)
    assert not PrefixCache(BlockPool(40), attention_only, blocks_per_cell=2).wants_snapshot(7, 7, 3)


def test_cells_that_hold_nothing_are_not_without_number() -> None:
    size = CacheSize(num_blocks=0, num_slots=2, block_bytes=0, slot_bytes=10**6, prefix_bytes=10_000)
    cache = PrefixCache(BlockPool(0), size, blocks_per_cell=2)
    for prompt in range(100):  # each is cancelled before its snapshot
        cache.put((prompt,), 1, (), None)
    assert 0 < len(cache) <= 20
    cache.clear()
    assert cache.nbytes == 0


def test_no_more_is_given_back_than_is_wanted() -> None:
    size = CacheSize(num_blocks=40, num_slots=2, block_bytes=100, slot_bytes=0, prefix_bytes=10**6)
    pool = BlockPool(40)
    cache = PrefixCache(pool, size, blocks_per_cell=2)
    for prompt in range(20):
        blocks = pool.take(2)
        cache.put((prompt,), 1, blocks, None)
        if prompt:  # the oldest is in use
            pool.drop(blocks)
    for wanted, left in ((1, 19), (2, 19), (3, 18), (8, 16), (100, 1)):
        cache.give_back(wanted)
        assert len(cache) == left
        assert pool.free == 40 - 2 * left
    assert cache.match((0,)).usable == 1
