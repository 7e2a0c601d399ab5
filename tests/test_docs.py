"""The documentation: its commands exist with the options that it names, its programs run, and the site shows every page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import tandem
from tandem.cli.app import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = sorted(DOCS.glob("*.md"))
RUN = ("tutorial-research", "extending")
"""Pages whose programs need neither torch nor a server."""


def blocks(page: Path, kind: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == kind]


def commands() -> list[tuple[str, str]]:
    """Lines of console blocks that begin with our command, by page."""
    found = []
    for page in PAGES:
        for body in blocks(page, "console"):
            for line in body.replace("\\\n", " ").splitlines():
                words = line.removeprefix("$ ").strip()
                if words.startswith("tandem "):
                    found.append((page.stem, words))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text[:60])
def test_a_command_of_the_documentation_exists(page: str, line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    for stop in ("|", ">", "&", "&&"):
        words = words[: words.index(stop)] if stop in words else words
    if "--" in words:
        words = words[: words.index("--")]
    while words and getattr(command, "commands", None) and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{page}: no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--version"}
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            assert word.partition("=")[0] in known, f"{page}: {line!r} has no option {word}"


@pytest.mark.parametrize("page", RUN)
def test_the_programs_of_a_page_run(page: str) -> None:
    """Those of `extending` define a policy, which then scales a simulated deployment."""
    names: dict[str, Any] = {"__name__": page}
    for body in blocks(DOCS / f"{page}.md", "python"):
        exec(compile(body, page, "exec"), names)
    if page == "extending":
        plan = tandem.find_plan(
            model="Qwen/Qwen3-8B",
            hardware="h100-sxm",
            gpus=4,
            workload=tandem.Workload.fixed(1024, 128),
            slo=tandem.Slo(ttft_s=1),
        )
        done = tandem.simulate(
            deployment=plan.best.deployment, workload=tandem.Workload.fixed(1024, 128), rate_rps=1.0, requests=20,
            policy=names["TwoThirds"](),
        )  # fmt: skip
        assert done.stats.completed == 20


def test_the_site_shows_every_page() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(text)["nav"])))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert shown - there == {"cli.md", "api.md"}  # made when the site is built
    assert there - shown == set()
