"""The explorer's page as a person uses it, in a real browser where one is installed: keys, a phone, dark rooms, slow models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from browser import Browser, Tab
from hosts import keep_a_host

pytest.importorskip("fastapi", reason="pip install tandem-lm[explore]")
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from tandem.explore import app as explorer
from tandem.explore.answers import Query, answer

Serving = Callable[[Any], AbstractContextManager[str]]
BEGIN = Query(
    model="nvidia/NVIDIA-Nemotron-Nano-9B-v2", hardware="h100-sxm", gpus=8, isl=4096, osl=512, ttft_s=2.0, tpot_s=0.02,
    backend="vllm",
)  # fmt: skip
"""Where the controls of a served page stand at first."""
CONTROLS = [
    "model", "other", "hardware", "backend", "gpus", "budget_usd_per_hour", "isl", "osl", "ttft_s", "tpot_s",
]  # fmt: skip
ANSWERED = "document.getElementById('took').textContent"
FITS = "document.documentElement.scrollWidth <= Math.min(360, document.documentElement.clientWidth)"
ROWS = [
    {"metric": metric, "group": "vllm", "what": "a row", "measured": 0.01 * n, "predicted": 0.011 * n}
    for metric in ("tpot_s", "ttft_s")
    for n in (1, 2, 3)
]


@pytest.fixture
def url(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(explorer, "measured_rows", lambda: {"source": "made up", "rows": ROWS})
    with serving(explorer.create_app()) as place:
        yield place


@pytest.fixture
def tab(browser: Browser, url: str) -> Iterator[Tab]:
    opened = browser.open(url)
    opened.until(ANSWERED)
    yield opened
    assert opened.faults == []
    opened.close()


def headline(found: dict[str, Any]) -> str:
    """What the page says first of an answer."""
    if "error" in found:
        return str(found["error"])
    name = found["model"].rpartition("/")[2].removeprefix("NVIDIA-")
    return f"{name} on {found['best']['gpus']} x {found['hardware']}: {found['why'][0]}"


def until_headline(tab: Tab, found: dict[str, Any]) -> None:
    tab.until(f"document.getElementById('headline').textContent === {headline(found)!r}")


def background(tab: Tab) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", tab.value("getComputedStyle(document.body).backgroundColor"))[:3]]


def test_arrow_keys_move_a_slider_and_the_answer_follows(tab: Tab) -> None:
    until_headline(tab, answer(BEGIN))
    tab.focus("#gpus")
    tab.press("ArrowLeft")
    until_headline(tab, answer(replace(BEGIN, gpus=4)))
    assert tab.value("document.getElementById('gpus').getAttribute('aria-valuetext')") == "4"
    assert "gpus=4" in tab.value("location.hash")
    tab.focus("#tpot_s")
    tab.press("End")
    until_headline(tab, answer(replace(BEGIN, gpus=4, tpot_s=None)))


def test_every_control_can_be_reached_with_the_tab_key(tab: Tab) -> None:
    reached = []
    for _ in range(2 + len(CONTROLS)):
        tab.press("Tab")
        reached.append(tab.value("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["A", *CONTROLS, "SUMMARY"]
    tab.press("Enter")
    tab.until("document.querySelector('#nearness canvas')")
    tab.press("Tab")
    assert tab.value("document.activeElement.id") == "metric"


def test_a_phone_shows_all_of_it(browser: Browser, url: str) -> None:
    tab = browser.open(url, width=360, height=740)
    tab.until(ANSWERED)
    assert tab.value(FITS)
    tab.click("summary")
    tab.until("document.querySelector('#nearness canvas')")
    assert tab.value(FITS)
    tab.choose("#model", "meta-llama/Meta-Llama-3.1-70B")
    tab.choose("#hardware", "a10g")
    tab.focus("#gpus")
    tab.press("Home")
    tab.until("document.querySelector('.refused')")
    assert tab.value(FITS)
    assert tab.value("innerWidth") == 360
    tab.close()


def test_a_dark_scheme_is_followed_at_once(tab: Tab) -> None:
    light = background(tab)
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = background(tab)
    assert min(light) > 200 > 60 > max(dark)
    ink = "getComputedStyle(document.body).color"
    assert min(int(part) for part in re.findall(r"\d+", tab.value(ink))[:3]) > 200


def test_a_budget_limits_the_gpus_and_says_so(tab: Tab) -> None:
    tab.focus("#budget_usd_per_hour")
    assert tab.text("#budget_usd_per_hour-told") == "none"
    tab.press("Home")
    until_headline(tab, answer(replace(BEGIN, budget_usd_per_hour=1.0)))
    assert tab.text("#headline") == "budget_usd_per_hour=1: one h100-sxm costs 6.88 USD an hour"
    for _ in range(4):
        tab.press("ArrowRight")
    until_headline(tab, answer(replace(BEGIN, budget_usd_per_hour=20.0)))
    assert "20 USD an hour pay for 2 x h100-sxm at 6.88: planned within 2 of 8 GPUs" in tab.text("#why")


def test_a_refusal_leaves_nothing_of_the_answer_before(tab: Tab) -> None:
    tab.until("document.querySelector('#frontier canvas')")
    tab.choose("#model", "Qwen/Qwen3-8B")
    tab.choose("#hardware", "a10g")
    tab.focus("#gpus")
    tab.press("Home")
    asked = replace(BEGIN, model="Qwen/Qwen3-8B", hardware="a10g", gpus=1)
    until_headline(tab, answer(asked))
    assert (
        tab.value("document.querySelectorAll('#frontier canvas, #cards *, #why *, #memory *, #time *, #changes *').length") == 0
    )
    assert tab.text("#took") == tab.text("#point") == ""
    assert tab.value("document.getElementById('frontier').getAttribute('aria-label')") is None
    tab.choose("#hardware", "h100-sxm")
    until_headline(tab, answer(replace(asked, hardware="h100-sxm")))
    assert tab.value("document.querySelectorAll('#frontier canvas').length") == 1


def test_a_slow_model_is_looked_at_roughly_first(browser: Browser, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole answer is held back until the first look has been seen."""
    seen = Event()

    def slowly(query: Query) -> dict[str, Any]:
        assert query.rough or query.gpus == 8 or seen.wait(60)
        return {**answer(query), "seconds": 1.0}

    monkeypatch.setattr(explorer, "answer", slowly)
    with serving(explorer.create_app()) as place:
        tab = browser.open(f"{place}#other=")
        tab.until(ANSWERED)
        assert "A first look" not in tab.text("#took")
        tab.focus("#gpus")
        tab.press("ArrowLeft")
        tab.until(f"{ANSWERED}.includes('A first look')")
        rough, whole = (answer(replace(BEGIN, gpus=4, rough=flag)) for flag in (True, False))
        assert rough["points"] < whole["points"]
        assert f"{rough['points']:,} design points" in tab.text("#took")
        seen.set()
        tab.until(f"{ANSWERED}.includes('{whole['points']:,} design points') && !{ANSWERED}.includes('A first look')")
        until_headline(tab, whole)
        assert tab.faults == []
        tab.close()


@pytest.mark.parametrize("status", [400, 503])
def test_an_error_object_is_told_and_not_taken_for_an_answer(
    browser: Browser, serving: Serving, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """As servers with OpenAI's API refuse: the line is told, and the same is asked again later."""
    busy = Event()

    class Refused(Exception):
        pass

    def perhaps(query: Query) -> dict[str, Any]:
        if busy.is_set() and query.gpus == 4:
            raise Refused
        return answer(query)

    async def refuse(*_: Any) -> JSONResponse:
        return JSONResponse({"error": {"message": "too much at once", "type": "server_error"}}, status)

    monkeypatch.setattr(explorer, "answer", perhaps)
    app: FastAPI = explorer.create_app()
    app.add_exception_handler(Refused, refuse)
    with serving(app) as place:
        tab = browser.open(f"{place}#other=")
        tab.until(ANSWERED)
        busy.set()
        tab.focus("#gpus")
        tab.press("ArrowLeft")
        tab.until(f"document.getElementById('headline').textContent === 'the server answered {status}: too much at once'")
        busy.clear()
        tab.press("ArrowRight")
        until_headline(tab, answer(BEGIN))
        tab.press("ArrowLeft")
        until_headline(tab, answer(replace(BEGIN, gpus=4)))
        tab.close()


def test_this_machine_is_served_by_its_own_engine(
    browser: Browser, serving: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Choosing it chooses the backend, and leaving it brings the other one back; a released model can be planned on it."""
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    keep_a_host()
    with serving(explorer.create_app()) as place:
        tab = browser.open(f"{place}#other=&gpus=1&backend=sglang&model=nano-hybrid&tpot_s=&ttft_s=")
        tab.until(ANSWERED)
        assert tab.text("#headline").startswith("nano-hybrid on 1 x h100-sxm: ")
        tab.choose("#hardware", "host")
        tab.until("document.getElementById('headline').textContent.startsWith('nano-hybrid on 1 x host: ')")
        assert tab.value("[document.getElementById('backend').value, document.getElementById('backend').disabled]") == [
            "tandem",
            True,
        ]
        assert "of no known price" in tab.text("#cards")
        tab.focus("#gpus")
        tab.press("End")
        tab.until("document.querySelector('.refused')")
        assert (
            tab.text("#headline")
            == answer(replace(BEGIN, model="nano-hybrid", hardware="host", gpus=1024, backend=None))["error"]
        )
        tab.choose("#hardware", "h100-sxm")
        assert tab.value("[document.getElementById('backend').value, document.getElementById('backend').disabled]") == [
            "sglang",
            False,
        ]
        assert tab.faults == []
        tab.close()


def test_each_page_has_a_name_of_its_own_and_counts_its_moves(browser: Browser, tab: Tab, url: str) -> None:
    """So that a server can leave out what the same page has moved on from."""

    def asked(of: Tab) -> list[tuple[str, int]]:
        names = of.value(
            "performance.getEntriesByType('resource').map((each) => each.name).filter((n) => n.includes('api/plan'))"
        )
        found = [re.search(r"&visit=(\w+)&move=(\d+)$", name) for name in names]
        return [(each[1], int(each[2])) for each in found if each is not None]

    tab.focus("#gpus")
    tab.press("ArrowLeft")
    until_headline(tab, answer(replace(BEGIN, gpus=4)))
    other = browser.open(url)
    other.until(ANSWERED)
    mine, theirs = asked(tab), asked(other)
    moves = [move for _, move in mine]
    assert moves == sorted(moves)
    assert set(moves) == {1, 2}
    assert (
        min(moves.count(1), moves.count(2)) >= 2
    )  # the model and the one beside it, and first looks where the machine is slow
    assert {move for _, move in theirs} == {1}
    assert len({visit for visit, _ in mine}) == len({visit for visit, _ in theirs}) == 1
    assert mine[0][0] != theirs[0][0]
    other.close()


def test_a_second_model_that_cannot_be_served_is_told(browser: Browser, url: str) -> None:
    beside = "meta-llama/Meta-Llama-3.1-70B"
    tab = browser.open(f"{url}#model=Qwen/Qwen3-8B&hardware=a10g&gpus=1&tpot_s=&other={beside}")
    tab.until(ANSWERED)
    asked = replace(BEGIN, model="Qwen/Qwen3-8B", hardware="a10g", gpus=1, tpot_s=None)
    assert tab.text("#headline") == headline(answer(asked))
    assert f"beside it, Meta-Llama-3.1-70B: {answer(replace(asked, model=beside))['error']}" in tab.text("#why")
    tab.close()
