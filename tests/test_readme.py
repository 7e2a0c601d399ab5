"""Every example of the README runs: a first-time reader copies them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
NEEDS_EXTRA = re.compile(r"^tandem (validate|calibrate)\b")


def commands() -> list[str]:
    """Lines that start with `$ tandem`, those that a backslash continues joined."""
    blocks = [body for kind, body in BLOCK.findall(TEXT) if kind == "console"]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    found = [line.removeprefix("$ ").strip() for line in lines if line.startswith("$ tandem")]
    return [line for line in found if not line.startswith("tandem serve")]  # runs until it is stopped: see `served`


def shown() -> list[tuple[str, str]]:
    """Each command that the README shows the output of, and that output."""
    pattern = r"^```console\n\$ (tandem[^\n]*)\n```\n```text\n(.*?)^```$"
    return re.findall(pattern, TEXT, flags=re.MULTILINE | re.DOTALL)


def programs() -> list[str]:
    return [body for kind, body in BLOCK.findall(TEXT) if kind == "python"]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, cwd=folder, env=dict(os.environ, COLUMNS="126"), check=False
    )


def test_the_readme_shows_commands_and_a_program() -> None:
    assert commands()
    assert programs()


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    if NEEDS_EXTRA.match(line) and find_spec("aiconfigurator_core") is None:
        pytest.skip("needs the extra [calibrate]")
    shell = f'set -eo pipefail; tandem() {{ "{sys.executable}" -m tandem.cli "$@"; }}; {line}'
    done = run(["bash", "-c", shell], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("line", "output"), shown())
def test_the_readme_shows_what_the_command_prints(line: str, output: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "tandem.cli", *shlex.split(line)[1:]], tmp_path)
    printed = " ".join(done.stdout.split())
    for row in filter(None, (" ".join(row.split()) for row in output.splitlines())):
        assert row in printed or row == "...", row


@contextmanager
def served() -> Iterator[str]:
    """The server that the README starts, on a free port."""
    (line,) = re.findall(r"^\$ tandem (serve .*)$", TEXT, flags=re.MULTILINE)
    words = [sys.executable, "-m", "tandem.cli", *shlex.split(line)]
    assert words[-2:] == ["--port", "8000"]
    with subprocess.Popen([*words[:-1], "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.parametrize("number", range(len(programs())))
def test_a_program_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    program = programs()[number]
    with served() if ADDRESS in program else nullcontext(ADDRESS) as url:
        done = run([sys.executable, "-W", "error", "-c", program.replace(ADDRESS, url)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_no_placeholder_is_left() -> None:
    assert "PLACEHOLDER" not in TEXT
    assert "TODO" not in TEXT
