"""A server in a process of its own: what it may say instead of its address, and that it ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.cli.served import served
from tandem.spec.errors import SpecError

READY = """print('{"url": "http://127.0.0.1:1", "model": "m"}', flush=True); import time; time.sleep(60)"""


def pretend(folder: Path, program: str) -> str:
    """An interpreter that runs this program, whatever it is asked to run."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{program}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (r"print('\nUsage: tandem serve\n\n  Serve a model')", "it ended after 'Usage: tandem serve Serve a model'"),
        ("pass", "it ended without a word"),
        ("print(5); print([1]); print('{}')", "it ended after '5 [1] {}'"),
        ("import sys; sys.exit('error: no room\\nfor it')", "no room for it"),
        (r"import os; os.write(1, b'\xff'); os.write(2, b'bad \xff')", "bad \ufffd"),
        ("import sys; sys.exit('x' * 999)", "... " + "x" * 300),
    ],
)  # fmt: skip
def test_a_server_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, told: str
) -> None:
    monkeypatch.setattr(sys, "executable", pretend(tmp_path, program))
    with pytest.raises(SpecError) as caught, served("m"):
        pass
    assert str(caught.value) == f"the server did not start: {told}"


def test_lines_before_the_address_are_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "executable", pretend(tmp_path, "print('loading'); print(5); " + READY))
    with served("m", ["--decode", "2"]) as ready:
        assert ready == {"url": "http://127.0.0.1:1", "model": "m"}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_whoever_started_it(tmp_path: Path, how: signal.Signals) -> None:
    server = pretend(tmp_path, f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {READY}")
    program = (
        f"import sys, time; sys.executable = {server!r}\n"
        "from tandem.cli.served import served\n"
        "with served('m'): print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(how)
        assert process.wait(30) != 0
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")  # nobody waits for an orphan
