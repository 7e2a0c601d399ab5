"""The explorer's page in a real browser, where one is installed: it draws the answers that it carries."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tandem.cli.served import served
from tandem.explore.answers import Query, answer, exported
from tandem.explore.page import exported_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSING = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=10000"]
ASKED = Query(model="Qwen/Qwen3-8B", hardware="h100-sxm", gpus=4, isl=1024, osl=128, ttft_s=2.0)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_an_exported_page_draws_its_answer(tmp_path: Path) -> None:
    found = copy.deepcopy(exported(ASKED))
    name = "<img src=x onerror=document.title='broken'>"
    found["answers"]["2048/512/0.02"]["why"][1] = name  # whatever a sentence holds, it is text
    page = tmp_path / "page.html"
    page.write_text(exported_page(found), encoding="utf-8")
    command = [str(BROWSER), *BROWSING, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    shown = found["answers"]["2048/512/0.02"]
    assert shown["recommended"] == answer(Query(**{**vars_of(ASKED), "isl": 2048, "osl": 512, "tpot_s": 0.02}))["recommended"]
    headline = re.search(r'id="headline"[^>]*>(.*?)</p>', dom, re.DOTALL)
    assert headline is not None
    assert unescape(headline[1]) == f"Qwen3-8B on {shown['best']['gpus']} x h100-sxm: {shown['why'][0]}"
    assert dom.count('class="card"') == 4
    assert "<canvas" in dom
    assert f"<li>{name.replace('<', '&lt;').replace('>', '&gt;')}</li>" in dom
    assert "<title>Tandem explorer</title>" in dom
    assert re.search(r"[\d,]+ design points, priced in", dom) is not None
    assert dom.count('type="range"') == 5
    assert len(re.findall(r"aria-valuetext=\"", dom)) == 5


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_servers_page_shows_its_workers(tmp_path: Path) -> None:
    """The server is one of this project's with emulated workers and a controller; the page asks it as a visitor's would."""
    options = [
        "--emulate",
        "h100-sxm",
        "--prefill",
        "1",
        "--decode",
        "2",
        "--scale",
        "fixed",
        "--ttft",
        "1",
        "--explore",
        "--name",
        "<b>q</b>",
    ]
    with served("qwen3-8b", options) as ready:
        command = [str(BROWSER), *BROWSING, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{ready['url']}/explore/"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    live = re.search(r'<section id="live".*?</section>', dom, re.DOTALL)
    assert live is not None
    assert 'hidden=""' not in live[0].partition(">")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', live[0]) == ["prefill-0", "decode-1", "decode-2"]
    assert "The controller scales these workers." in live[0]
    button = re.search(r'<button id="pause".*?</button>', live[0], re.DOTALL)
    assert button is not None
    assert "disabled" in button[0]  # nobody has a key here, so the page changes nothing
    assert 'id="keys" hidden' in dom


def vars_of(query: Query) -> dict[str, object]:
    return {name: getattr(query, name) for name in query.__dataclass_fields__}
