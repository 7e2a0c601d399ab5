from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.sim.trace_forms import grid_of, spread
from tandem.sim.traces import load_trace, repeat, superpose, thin, window
from tandem.spec.errors import SpecError
from tandem.spec.workload import Trace

# --- stamps on a grid ---


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 10.0), st.integers(0, 10**6), st.floats(0.5, 5.0))
def test_a_grid_is_found_whatever_its_step_and_spreading_stays_within_it(grid_s: float, seed: int, each: float) -> None:
    rng = np.random.default_rng(seed)
    at_s = np.floor(np.cumsum(rng.exponential(1 / each, 600))) * grid_s
    found = grid_of(at_s)
    assert found == pytest.approx(grid_s, rel=1e-6)
    ones = np.ones(600, dtype=np.int64)
    after = spread(Trace(name="t", arrival_s=at_s - at_s[0], isl=np.arange(600) + 1, osl=ones), seed)
    late = after.arrival_s + at_s[0] - at_s
    assert late.max() - late.min() <= grid_s * (1 + 1e-9)
    assert (np.diff(after.arrival_s) >= 0).all()
    assert after.isl.tolist() == list(range(1, 601))
    assert grid_of(after.arrival_s) is None


@pytest.mark.parametrize("kind", ["continuous", "milliseconds", "regular", "few"])
def test_other_stamps_are_left_as_they_are(kind: str) -> None:
    at_s = np.cumsum(np.random.default_rng(0).exponential(0.5, 500))
    at_s = {"continuous": at_s, "milliseconds": np.round(at_s, 3), "regular": np.arange(500.0), "few": np.repeat([0, 3, 6], 9)}[
        kind
    ]
    assert grid_of(np.asarray(at_s, dtype=float)) is None


# --- what is made of a trace ---


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    n = draw(st.integers(1, 30))
    gaps = draw(st.lists(st.floats(0, 5), min_size=n, max_size=n))
    counts = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    at_s = np.cumsum(gaps)
    bare = draw(st.booleans())
    return Trace(
        name="t", arrival_s=at_s - at_s[0], isl=np.arange(n) + 1, osl=np.arange(n) + 100,
        client=None if bare else np.arange(n, dtype=np.int32) % 3,
        prefix_hash=None if bare else np.arange(sum(counts), dtype=np.int64) % 5 * 2**60,
        prefix_end=None if bare else np.cumsum(counts),
    )  # fmt: skip


def requests(trace: Trace) -> list[tuple[Any, ...]]:
    """Each request as one thing, the plain way."""
    rows, begin = [], 0
    for n in range(len(trace)):
        hashes: tuple[int, ...] | None = None
        if trace.prefix_hash is not None and trace.prefix_end is not None:
            hashes, begin = tuple(trace.prefix_hash[begin : trace.prefix_end[n]].tolist()), int(trace.prefix_end[n])
        client = None if trace.client is None else int(trace.client[n])
        rows.append((float(trace.arrival_s[n]), int(trace.isl[n]), int(trace.osl[n]), client, hashes))
    return rows


@settings(max_examples=60, deadline=None)
@given(traces(), st.data())
def test_rows_of_a_trace_are_whole_requests(trace: Trace, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(trace) - 1), min_size=1, max_size=40))
    plain = requests(trace)
    assert requests(trace.rows(np.array(places))) == [plain[place] for place in places]
    mask = np.isin(np.arange(len(trace)), places)
    assert requests(trace.rows(mask)) == [plain[place] for place in sorted(set(places))]


@settings(max_examples=60, deadline=None)
@given(traces(), st.floats(0, 30), st.floats(0.1, 30))
def test_windows_of_a_trace_are_a_partition_of_it(trace: Trace, start_s: float, duration_s: float) -> None:
    cuts = []
    for begin_s, lasts_s in ((0.0, start_s), (start_s, duration_s), (start_s + duration_s, None)):
        try:
            part = window(trace, begin_s, lasts_s)
        except SpecError:
            continue
        assert part.arrival_s[0] == 0.0
        cuts += [row[1:] for row in requests(part)]
    assert cuts == [row[1:] for row in requests(trace)]


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 5), st.integers(0, 100), st.floats(0, 20))
def test_copies_at_once_are_the_same_traffic_of_other_people(trace: Trace, copies: int, seed: int, jitter_s: float) -> None:
    many = superpose(trace, copies, seed, jitter_s)
    assert (np.diff(many.arrival_s) >= 0).all()
    assert Counter(many.isl.tolist()) == dict.fromkeys(trace.isl.tolist(), copies)
    assert many.arrival_s[-1] <= trace.arrival_s[-1] + 1e-9
    if trace.client is not None and many.client is not None:
        assert len(set(many.client.tolist())) == copies * len(set(trace.client.tolist()))
    if trace.prefix_hash is not None and many.prefix_hash is not None:
        assert len(set(many.prefix_hash.tolist())) == copies * len(set(trace.prefix_hash.tolist()))
        shapes = Counter((row[1], len(row[4])) for row in requests(trace))
        assert Counter((row[1], len(row[4])) for row in requests(many)) == {k: n * copies for k, n in shapes.items()}
    twice = repeat(trace, 2)
    assert [row[1:] for row in requests(twice)] == [row[1:] for row in requests(trace)] * 2
    assert (np.diff(twice.arrival_s) >= 0).all()


def test_thinning_keeps_its_share_and_a_rate_is_multiplied() -> None:
    trace = load_trace("azure-conversation-2023")
    few = thin(trace, 0.25, seed=4)
    assert len(few) == pytest.approx(len(trace) / 4, abs=4 * np.sqrt(len(trace) * 0.25 * 0.75))
    assert set(zip(few.isl.tolist(), few.osl.tolist(), strict=True)) <= set(
        zip(trace.isl.tolist(), trace.osl.tolist(), strict=True)
    )
    fast = load_trace("azure-conversation-2023", scale=2.0, start_s=100.0, duration_s=500.0)
    assert fast.arrival_s.tolist() == (window(trace, 100.0, 500.0).arrival_s / 2).tolist()
    assert fast.note == "from 100 to 600 s; rate times 2"
    for wrong in (0.0, 1.5, 1e-12):
        with pytest.raises(SpecError, match="factor="):
            thin(trace, wrong)


def test_a_million_requests_of_a_recording() -> None:
    trace = superpose(load_trace("azure-conversation-2023"), 52, seed=1)
    assert len(trace) == 52 * 19_366 > 1_000_000
    seconds = [
        np.bincount((each.arrival_s // 60).astype(int), minlength=59) for each in (trace, load_trace("azure-conversation-2023"))
    ]
    assert np.corrcoef(seconds)[0, 1] > 0.8
    with pytest.raises(SpecError, match="copies=2000"):
        superpose(trace, 2000)
