"""The explorer's page in a real browser, where one is installed: it draws answers that it carries, and a server's workers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Tab

from tandem.cli.served import served
from tandem.explore.answers import Query, answer, exported
from tandem.explore.page import exported_page
from tandem.spec.catalog import load_hardware, load_spec

ASKED = Query(model="Qwen/Qwen3-8B", hardware="h100-sxm", gpus=4, isl=1024, osl=128, ttft_s=2.0)
KEY = "a key of this test"
EMULATED = ["--emulate", "h100-sxm", "--prefill", "1", "--decode", "2", "--scale", "fixed", "--ttft", "1", "--explore"]
SWITCH = "document.getElementById('pause')"


@pytest.fixture
def server(browser: Browser) -> Iterator[str]:
    """One of this project's with emulated workers and a controller, whose name is no HTML."""
    with served("qwen3-8b", [*EMULATED, "--name", "<b>q</b>"]) as ready:
        yield f"{ready['url']}/explore/"


@pytest.fixture
def server_with_keys(browser: Browser, tmp_path: Path) -> Iterator[str]:
    keys = tmp_path / "keys"
    keys.write_text(f"tests:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with served("qwen3-8b", [*EMULATED, "--api-keys", str(keys)]) as ready:
        yield f"{ready['url']}/explore/"


def shown(tab: Tab, selector: str) -> list[str]:
    """Texts of elements."""
    return list(tab.value(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)"))


def open_page(browser: Browser, found: dict[str, Any], folder: Path) -> Tab:
    page = folder / "page.html"
    page.write_text(exported_page(found), encoding="utf-8")
    tab = browser.open(page.as_uri())
    tab.until("document.getElementById('took').textContent")
    return tab


def test_an_exported_page_draws_its_answer(browser: Browser, tmp_path: Path) -> None:
    found = copy.deepcopy(exported(ASKED))
    name = "<img src=x onerror=document.title='broken'>"
    best = found["answers"]["2048/512/0.02"]
    best["why"][1] = name  # whatever a sentence holds, it is text
    tab = open_page(browser, found, tmp_path)
    assert best["recommended"] == answer(replace(ASKED, isl=2048, osl=512, tpot_s=0.02))["recommended"]
    assert tab.text("#headline") == f"Qwen3-8B on {best['best']['gpus']} x h100-sxm: {best['why'][0]}"
    assert tab.value("document.querySelectorAll('.card').length") == 4
    assert tab.value("document.querySelectorAll('#frontier canvas').length") == 1
    assert name in shown(tab, "#why li")
    assert tab.value("document.title") == "Tandem explorer"
    assert "design points, priced in" in tab.text("#took")
    assert tab.value("document.querySelectorAll('input[type=range][aria-valuetext]').length") == 6
    tab.focus("#osl")
    tab.press("End")
    longest = found["answers"]["2048/8192/0.02"]
    told = longest.get("error") or f"Qwen3-8B on {longest['best']['gpus']} x h100-sxm: {longest['why'][0]}"
    tab.until(f"document.getElementById('headline').textContent === {told!r}")
    assert tab.faults == []
    tab.close()


def test_an_exported_page_names_what_it_was_asked_of(browser: Browser, tmp_path: Path) -> None:
    """A model and a GPU of files, the one with a name of the catalogue's in part, the other in whole."""
    model = replace(load_spec("meta-llama/Meta-Llama-3.1-70B"), name="qwen3-8b")
    gpu = replace(load_hardware("b200-sxm"), name="a10g", title="Our own box")
    found = exported(replace(ASKED, model=model.name, hardware=gpu.name), model=model, hardware=gpu)
    tab = open_page(browser, found, tmp_path)
    assert tab.text("#headline").startswith("qwen3-8b on ")
    assert " x a10g: " in tab.text("#headline")
    assert shown(tab, "#model option:checked") == ["qwen3-8b (70.6 B)"]
    assert shown(tab, "#hardware option:checked")[0].startswith("Our own box (")
    assert shown(tab, "#backend option:checked") == ["vllm"]
    assert tab.value("[...document.querySelectorAll('#controls select')].every((each) => each.disabled)")
    tab.close()


def test_a_servers_page_shows_its_workers_and_turns_no_switch_without_keys(browser: Browser, server: str) -> None:
    tab = browser.open(server, width=360)
    tab.until("document.querySelectorAll('#workers th').length")
    assert shown(tab, "#workers th") == ["prefill-0", "decode-1", "decode-2"]
    tab.until("document.getElementById('took').textContent")
    assert tab.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth && innerWidth === 360")
    assert tab.text("#live-state") == "The controller scales these workers."
    assert tab.value(f"{SWITCH}.disabled")  # nobody has a key here, so the page changes nothing
    assert "The switch is for servers with --api-keys" in tab.text("#pause-why")
    tab.click("#pause")
    assert tab.value("fetch('../pools').then((told) => told.json()).then((pools) => pools.mode)") == "running"
    assert tab.value("document.getElementById('keys').hidden")
    assert tab.faults == []
    tab.close()


def test_with_a_key_the_page_pauses_the_controller(browser: Browser, server_with_keys: str) -> None:
    tab = browser.open(server_with_keys)
    for key, told in (("none of theirs", "That key is not known here."), (KEY, None)):
        tab.until("document.activeElement.id === 'key'")
        tab.value("document.getElementById('key').select()")
        tab.write(key)
        tab.press("Enter")
        if told is not None:
            tab.until(f"document.getElementById('headline').textContent === {told!r}")
    tab.until(f"!{SWITCH}.hidden && !{SWITCH}.disabled && document.getElementById('took').textContent")
    for told, state in (("Pause the controller", "is paused"), ("Let the controller go on", "scales these workers")):
        assert tab.text("#pause") == told
        tab.focus("#pause")
        tab.press("Enter")
        tab.until(f"document.getElementById('live-state').textContent.includes({state!r})")
    assert KEY not in tab.value("document.documentElement.outerHTML + location.href + JSON.stringify(localStorage)")
    assert tab.faults == []
    tab.close()
