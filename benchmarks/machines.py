"""Two machines within this one: network namespaces and a link, that is cut and healed while a model is served and trained.

    python benchmarks/machines.py [--model nano-align-hybrid] [--cut 4] [--long 60] [--only serve|train]

Needs root and `ip` (it makes namespaces of its own and removes them). A Ray cluster spans both; prefill runs on one, decode on
the other. Every answer that was under way during a cut must come whole and equal to the undisturbed one.
Then torchrun trains across both, and its losses stand beside those of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

BRIDGE, NAMES = "tandem-br", ("tandem-a", "tandem-b")
ADDRESSES = dict(zip(NAMES, ("10.77.0.1", "10.77.0.2"), strict=True))
GATE = "10.77.0.254"
RAY_PORT, HTTP_PORT = 6399, 8000
REQUESTS, TOKENS = 8, 600


def ip(*words: str, check: bool = True) -> None:
    """One `ip` command."""
    subprocess.run(["ip", *words], check=check, capture_output=True)


@contextlib.contextmanager
def machines() -> Iterator[None]:
    """Two namespaces behind a bridge, which this process can reach; removed at the end."""
    remove()
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{GATE}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in ADDRESSES.items():
            ip("netns", "add", name)
            ip("link", "add", f"{name}-br", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-br", "master", BRIDGE, "up")
            for words in (
                ("addr", "add", f"{address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", name, *words)
        yield
    finally:
        remove()


def remove() -> None:
    """Nothing of ours is left."""
    for name in NAMES:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("link", "del", f"{name}-br", check=False)
        ip("netns", "del", name, check=False)
    ip("link", "del", BRIDGE, check=False)


def cut(name: str, seconds: float) -> None:
    """Take a machine's cable out, and put it back."""
    ip("link", "set", f"{name}-br", "down")
    time.sleep(seconds)
    ip("link", "set", f"{name}-br", "up")


def on(name: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command on a machine."""
    return subprocess.Popen(["ip", "netns", "exec", name, *words], text=True, **options)


def where(pattern: str) -> dict[str, list[str]]:
    """Command lines of processes that match, by machine."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
        for pid in pids:
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if re.search(pattern, line):
                    found.setdefault(name, []).append(line[:60])
    return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Ray on both machines; its address."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1", "--object-store-memory", str(200 << 20)]
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": (folder / "ray.log").open("w"),
    }
    head, other = NAMES
    address = f"{ADDRESSES[head]}:{RAY_PORT}"
    more = ["--head", "--port", str(RAY_PORT), "--include-dashboard", "false", "--temp-dir", str(folder / "ray")]
    for name, words in ((head, more), (other, ["--address", address])):
        if on(name, *ray, "--node-ip-address", ADDRESSES[name], *words, **quiet).wait(120):
            raise SystemExit(f"ray did not start on {name}: {(folder / 'ray.log').read_text()[-500:]}")
    yield address


@contextlib.contextmanager
def server(model: str, address: str, folder: Path) -> Iterator[str]:
    """A server on the first machine, whose workers are Ray's; its URL."""
    words = [
        sys.executable,
        "-m",
        "tandem.cli",
        "serve",
        model,
        "--cluster",
        address,
        "--host",
        ADDRESSES[NAMES[0]],
        "--port",
        str(HTTP_PORT),
    ]
    log = (folder / "serve.log").open("w")
    options = ["--prefill", "1", "--decode", "1", "--dtype", "float32", "--threads", "1", "--drain", "1"]
    process = on(NAMES[0], *words, *options, stdout=subprocess.PIPE, stderr=log)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit(f"the server did not start: {(folder / 'serve.log').read_text()[-800:]}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


def ask(url: str, model: str, number: int) -> str:
    """One streamed answer, whole."""
    text = f"{number} cows and {number + 1} ants have legs. " * 30  # long enough not to be read where it is decoded
    body = {"model": model, "prompt": text, "max_tokens": TOKENS, "stream": True,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    text, ended = "", None
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600.0) as stream:
        if stream.status_code != 200:
            raise SystemExit(f"HTTP {stream.status_code}: {stream.read().decode()[:300]}")
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])
                if "error" in choice:
                    raise SystemExit(f"request {number}: {choice['error']['message']}")
                for part in choice["choices"]:
                    text += part["text"]
                    ended = part["finish_reason"] or ended
    if ended is None:
        raise SystemExit(f"request {number}: the stream ended without saying why")
    return text


def ask_all(url: str, model: str) -> tuple[list[str], float]:
    """All answers at once, and the seconds that took."""
    answers = [""] * REQUESTS
    began = time.perf_counter()

    def one(number: int) -> None:
        answers[number] = ask(url, model, number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - began


def serve_across(model: str, cuts: Sequence[float], folder: Path) -> None:
    """Answers before, during and after cuts of the second machine's link."""
    with cluster(folder) as address:
        began = time.perf_counter()
        nobody = [sys.executable, "-m", "tandem.cli", "serve", model, "--cluster", f"{ADDRESSES[NAMES[1]]}:9", "--port", "0"]
        refused = on(NAMES[0], *nobody, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        told = refused.communicate(timeout=120)[1].strip().splitlines()[-1]
        print(f"a cluster that is not there, after {time.perf_counter() - began:.0f} s: {told}", flush=True)
        with server(model, address, folder) as url:
            places = {name: len(lines) for name, lines in where(r"ray::").items()}
            print(f"actors by machine: {places}", flush=True)
            before, took_s = ask_all(url, model)
            print(f"undisturbed: {REQUESTS} answers of {TOKENS} tokens in {took_s:.1f} s", flush=True)
            for seconds in cuts:
                knife = threading.Timer(0.3 * took_s, cut, (NAMES[1], seconds))
                knife.start()
                answers, during_s = ask_all(url, model)
                knife.join()
                same = sum(a == b for a, b in zip(before, answers, strict=True))
                after, after_s = ask_all(url, model)
                again = sum(a == b for a, b in zip(before, after, strict=True))
                print(
                    f"link cut for {seconds:g} s: {same} of {REQUESTS} answers equal, in {during_s:.1f} s; after it healed "
                    f"{again} of {REQUESTS} in {after_s:.1f} s; actors { ({n: len(v) for n, v in where(r'ray::').items()}) }",
                    flush=True,
                )
                if (same, again) != (REQUESTS, REQUESTS):
                    raise SystemExit("answers were lost or changed")


def train_across(folder: Path) -> None:
    """Losses of a short run on both machines beside one process's."""
    settings = ["batch.tokens=65536", "data.sources.reasoning.documents=2000", "evaluate.problems=1"]
    losses: dict[str, list[float]] = {}
    data = folder / "data"
    for label in ("one", "two"):
        out = folder / label
        words = ["-m", "tandem.cli", "train", "nano-hybrid", *settings, "--out", str(out)]
        if data.is_dir():
            shutil.copytree(data, out / "data")
        if label == "one":
            runs = [subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, text=True)]
        else:
            common = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[NAMES[0]], "--master-port", "29511"]
            runs = [
                on(name, "env", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run",
                   *common, "--node-rank", str(rank), *words, stdout=subprocess.DEVNULL)
                for rank, name in enumerate(NAMES)
            ]  # fmt: skip
        if any(run.wait(900) for run in runs):
            raise SystemExit(f"training on {label} failed")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[label] = [row["loss"] for row in rows if isinstance(row.get("loss"), float)]
        if label == "one":
            shutil.copytree(out / "data", data)
    apart = max(abs(a / b - 1) for a, b in zip(losses["one"], losses["two"], strict=True))
    print(f"torchrun on both machines: {len(losses['two'])} losses, at most {apart:.1e} from one process's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-align-hybrid")
    parser.add_argument("--cut", type=float, default=4.0, help="Seconds of a short cut, which connections outlive.")
    parser.add_argument("--long", type=float, default=60.0, help="Seconds of a long one, after which Ray gives the node up.")
    parser.add_argument("--only", choices=["serve", "train"])
    options = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None:
        raise SystemExit("needs root and `ip`: network namespaces are made and removed")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory() as folder, machines():
        if options.only != "train":
            serve_across(options.model, (options.cut, options.long), Path(folder))
        if options.only != "serve":
            train_across(Path(folder))


if __name__ == "__main__":
    main()
