"""Servers that benchmarks/serve.py measures, each in a process of its own: ours and transformers'."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_client import Answer

HERE = Path(__file__).parent
AIPERF = "aiperf==0.13.0"
_START_S = 120.0
_ASK_S = 240.0
_TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A process that serves HTTP; leave its `with` block and it is gone."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self.url, self.log = "", log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=dict(env), stdout=subprocess.PIPE, stderr=stream, stdin=subprocess.DEVNULL
            )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask twice, as one does who does not wait for a drain; then do not ask."""
        for asked in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(asked)
                try:
                    self.process.wait(10 if asked == signal.SIGTERM else None)
                except subprocess.TimeoutExpired:
                    continue
        assert self.process.stdout is not None
        self.process.stdout.close()

    def fail(self, what: str) -> RuntimeError:
        """What to raise, with the end of the server's log."""
        return RuntimeError(f"{what}; its log ends: {self.log.read_text(errors='replace')[-2000:]}")

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Stop all of the process for a while, so that something else can be measured in the midst of its work."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def status_bytes(self, field: str) -> int:
        """A size of /proc/PID/status, such as VmRSS or VmHWM."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) * 1024

    def thread_cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each thread has used, by its id; the process's own id is the main thread's (the event loop)."""
        seconds = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            seconds[task.name] = (int(fields[11]) + int(fields[12])) / _TICKS
        return seconds

    def loop_cpu_s(self) -> float:
        """Seconds of CPU that the event loop's thread has used."""
        return self.thread_cpu_s()[str(self.process.pid)]

    def ask(self, bodies: Sequence[Mapping[str, Any]], concurrency: int, *, path: str = "/v1/completions") -> list[Answer]:
        """Answers to requests, so many at once, through a thin client in a process of its own."""
        lines = "\n".join(json.dumps(body) for body in bodies)
        command = [sys.executable, str(HERE / "serve_client.py"), self.url + path, str(concurrency)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=_ASK_S)
        answers = [Answer(**entry) for entry in json.loads(done.stdout)]
        wrong = [answer.error for answer in answers if answer.error is not None]
        if wrong:
            raise self.fail(f"{len(wrong)} of {len(answers)} requests failed: {wrong[0]}")
        return answers


def tandem_server(
    model: str, scratch: Path, *options: str, threads: int, env: Mapping[str, str] = os.environ, times: Path | None = None
) -> ServerProcess:
    """`tandem serve` with one worker that prefills and decodes; with `times`, steps are noted there when it ends."""
    start = (
        [sys.executable, "-m", "tandem.cli"] if times is None else [sys.executable, str(HERE / "serve_times.py"), str(times)]
    )
    command = [*start, "serve", model, "--port", "0", "--prefill", "0", "--decode", "1", "--threads", str(threads), *options]
    server = ServerProcess(command, env=env, log=scratch / "tandem.log")
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    if not line:
        server.stop()
        raise server.fail("tandem serve did not start")
    server.url = json.loads(line)["url"]
    return server


def transformers_server(folder: Path, scratch: Path, *options: str, threads: int) -> ServerProcess:
    """`transformers serve` of a folder in fp32, its fastest dtype on a CPU without bf16 arithmetic."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [
        str(program), "serve", str(folder), "--device", "cpu", "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    server = ServerProcess(command, env=env, log=scratch / "transformers.log")
    server.url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return server
        except OSError:
            time.sleep(0.2)
    server.stop()
    raise server.fail("transformers serve did not start")


def plain_environment() -> dict[str, str]:
    """This process's environment without the allocator's settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}


def aiperf_program(given: Path | None) -> Path | None:
    """AIPerf where it is given, else installed once into a virtual environment of its own; None where that fails."""
    if given is not None:
        return None if str(given) == "none" else given
    folder = HERE.parent / ".bench-venv"
    program = folder / "bin" / "aiperf"
    if program.exists():
        return program
    print(f"installing {AIPERF} into {folder.name} (some minutes, once)", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", AIPERF], check=True)
    except subprocess.CalledProcessError as wrong:
        print(f"no AIPerf: {wrong}")
        return None
    (folder / ".gitignore").write_text("*\n")
    return program


def aiperf(program: Path, server: ServerProcess, *options: str) -> dict[str, Any]:
    """What AIPerf reports of a run against `server`: its JSON summary. Raises RuntimeError where it fails."""
    env = {key: value for key, value in plain_environment().items() if key != "HF_HUB_OFFLINE"}  # with it, it fails
    with tempfile.TemporaryDirectory() as out:
        command = [str(program), "profile", "--url", server.url, "--ui", "none", "--artifact-dir", out, *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=_ASK_S)
        found = sorted(Path(out).rglob("profile_export_aiperf.json"))
        if done.returncode or not found:
            raise RuntimeError(f"aiperf failed ({done.returncode}): {(done.stdout + done.stderr)[-2000:]}")
        summary: dict[str, Any] = json.loads(found[0].read_text())
        return summary
