"""The loops that a machine's calibration is fitted to: all of them whole, or none."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from aiohttp import web
from bench_cases import Stub, in_thread

from tandem.bench.client import Target
from tandem.bench.grid import measure_grid
from tandem.spec.errors import SpecError

POINTS = [(5, 3, 1, 2), (7, 4, 2, 2)]


def test_each_point_is_a_row() -> None:
    with in_thread(Stub) as (url, stub):
        rows = measure_grid(Target(url=url, model="served"), POINTS)
    assert [(row.isl, row.osl, row.concurrency, row.per_place) for row in rows] == POINTS
    assert len(stub.bodies) == (1 + 4) + (1 + 2) + (1 + 4)  # the last point once more, and warm-ups
    assert all(0 < row.tpot_s < 1 for row in rows)


def test_a_request_that_fails_is_not_left_out_of_the_fit_in_silence() -> None:
    def failing() -> Stub:
        async def answer(stream: web.StreamResponse, body: dict[str, Any]) -> None:
            if len(stub.bodies) == 7:
                await Stub.lines(stream, b'{"error": "worker died"}')
            else:
                await stub.whole(stream, body)

        stub = Stub(answer=answer)
        return stub

    with in_thread(failing) as (url, _), pytest.raises(SpecError) as caught:
        measure_grid(Target(url=url, model="served"), POINTS)
    why = "1 of 2 requests failed: the stream broke off: worker died"
    assert str(caught.value) == f"url={url!r}: 5 + 3 tokens, 1 in flight: {why}"
