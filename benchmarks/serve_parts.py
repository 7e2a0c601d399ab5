"""The parts of benchmarks/serve.py: each measures, and adds figures with their targets."""

from __future__ import annotations

import json
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from model_parts import HYBRID, smollm2_folder, write_hybrid
from serve_client import Answer, connect
from serve_engine import (
    SHARED,
    TAIL,
    PairedSteps,
    new_engine,
    periods,
    prefix_savings,
    prompts_of,
    share_of,
)
from serve_servers import HERE, ServerProcess, aiperf, plain_environment, tandem_server, transformers_server
from serve_times import note_steps

import tandem
from tandem.model.tokenizer import load_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CONCURRENCY = 32
ISL, OSL = 64, 96
NAME = "smollm2"
STREAMS = 1000
IDLE_CACHE_BYTES = 512 << 20
"""Touched when the server starts, so it is added to what the streams cost."""


@dataclass(frozen=True)
class Figure:
    """One number, and what it must reach; target None for one that only explains."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def passes(self) -> bool | None:
        """Whether it reaches its target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        """All of it, with the verdict."""
        return asdict(self) | {"passes": self.passes}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all parts share."""

    scratch: Path
    folder: Path
    peer_folder: Path
    threads: int
    aiperf: Path | None
    rounds: int
    quick: bool


def model_folders(scratch: Path) -> tuple[Path, Path]:
    """SmolLM2 as a checkpoint folder, and again without an end-of-sequence token, for a server that cannot ignore it."""
    folder = smollm2_folder(scratch)
    peer = scratch / "peer"
    shutil.copytree(folder, peer)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((peer / name).read_text())
        fields.pop("eos_token_id", None)
        (peer / name).write_text(json.dumps(fields))
    return folder, peer


def _bodies(prompts: Sequence[Any], osl: int, **more: Any) -> list[dict[str, Any]]:
    common = {"max_tokens": osl, "temperature": 0.0, "stream": True} | more
    return [{"model": NAME, "prompt": prompt, **common} for prompt in prompts]


def _ours(prompts: Sequence[Any], osl: int) -> list[dict[str, Any]]:
    return _bodies(prompts, osl, ignore_eos=True, stream_options={"include_usage": True})


def overhead(setting: Setting, figures: list[Figure], details: dict[str, Any]) -> None:
    """The engine against the raw decoder, and the server against the engine's decode steps, at the same batch and contexts."""
    model, tokenizer = tandem.load_model(setting.folder, dtype="float16"), load_tokenizer(setting.folder)
    vocabulary, osl = model.spec.vocab_size, 24 if setting.quick else OSL
    notes = note_steps()
    engine = new_engine(model, tokenizer, threads=setting.threads, max_context=2048)
    rows: dict[str, list[Any]] = {"pairs": [], "server": [], "loop": []}
    times = setting.scratch / "notes.json"
    options = ("--name", NAME, "--dtype", "float16")
    with tandem_server(str(setting.folder), setting.scratch, *options, threads=setting.threads, times=times) as server:
        server.ask(_ours(prompts_of(2, ISL, vocabulary, 7), 4), 2)
        for number in range(setting.rounds):
            prompts = prompts_of(CONCURRENCY, ISL, vocabulary, number)
            pairs = PairedSteps(engine, prompts, osl, notes)
            begin_s, loop_s = time.monotonic(), server.loop_cpu_s()
            answers, stops, halted_s = _in_turns(server, _ours(prompts, osl), pairs)
            rows["pairs"].append(pairs.finish())
            rows["server"].append((begin_s, time.monotonic(), stops))
            wall_s = max(a.end_s or 0.0 for a in answers) - begin_s - halted_s
            rows["loop"].append((server.loop_cpu_s() - loop_s, wall_s))
        after_s, loop_s = time.monotonic(), server.loop_cpu_s()
        try:
            summary = _aiperf(setting, server, osl)
        except (RuntimeError, subprocess.SubprocessError) as wrong:
            summary, details["aiperf failed"] = None, str(wrong)
            print(f"  {wrong}")
        aiperf_loop_s = server.loop_cpu_s() - loop_s
    noted = json.loads(times.read_text())
    served = [
        periods([n for n in noted if begin <= n[1] <= end], CONCURRENCY, stops=stops) for begin, end, stops in rows["server"]
    ]
    rounds = []
    for pair, theirs, (busy_s, wall_s) in zip(rows["pairs"], served, rows["loop"], strict=True):
        rounds.append(
            {
                "engine_share": float(pair.raw_s.sum() / pair.step_s.sum()),
                "server_share": share_of(theirs, pair.context, pair.decode_s),
                "inside_share": theirs.inside,
                "raw_step_s": float(np.median(pair.raw_s)),
                "engine_step_s": float(np.median(pair.step_s)),
                "engine_decode_s": float(np.median(pair.decode_s)),
                "server_step_s": theirs.usual,
                "steps": len(theirs.seconds),
                "loop_cpu_share": busy_s / wall_s,
            }
        )
    details["rounds"] = rounds
    middle = {key: statistics.median(r[key] for r in rounds) for key in ("raw_step_s", "engine_step_s", "server_step_s")}
    share = statistics.median(r["engine_share"] for r in rounds)
    figures.append(
        Figure(
            "engine's tokens/s of the raw decoder's, batch 32", 100 * share, "%", 90, at_least=True,
            note=f"steps of {1e3 * middle['raw_step_s']:.1f} ms raw, {1e3 * middle['engine_step_s']:.1f} ms engine, medians",
        )
    )  # fmt: skip
    lost = 1 - statistics.median(r["server_share"]["mean"] for r in rounds)
    inside = 1 - statistics.median(r["inside_share"] for r in rounds)
    loop = statistics.median(r["loop_cpu_share"] for r in rounds)
    usual = 1 - statistics.median(r["server_share"]["median"] for r in rounds)
    figures.append(
        Figure(
            "server's overhead of its step time, thin client", 100 * lost, "%", 10,
            note=f"step {1e3 * middle['server_step_s']:.1f} ms; usual step {100 * usual:.1f} %; outside the decode step "
            f"{100 * inside:.1f} %, the rest is decoding beside other work; event loop {100 * loop:.1f} % of a core; rounds "
            + ", ".join(f"{100 - 100 * r['server_share']['mean']:.1f}" for r in rounds),
        )
    )  # fmt: skip
    figures.append(Figure("of it outside the decode step, as the server's own clock has it", 100 * inside, "%", 10))
    apart = statistics.median(float(theirs.decode_s.mean()) for theirs in served) / statistics.median(
        float(pair.decode_s.mean()) for pair in rows["pairs"]
    )
    figures.append(
        Figure(
            "decode step inside the server, of the one alone", 100 * apart, "%",
            note="" if 0.95 <= apart <= 1.1 else "the machine was NOT QUIET: repeat before believing the first two figures",
        )
    )  # fmt: skip
    if summary is None:
        return
    under = periods([n for n in noted if n[1] >= after_s], CONCURRENCY)
    pair = rows["pairs"][-1]
    rate = summary.get("output_token_throughput", {}).get("avg")
    details["aiperf"] = {
        key: summary[key] for key in ("output_token_throughput", "time_to_first_token", "inter_token_latency") if key in summary
    }
    details["aiperf_steps"] = len(under.seconds)
    if not len(under.seconds):
        figures.append(Figure("tokens/s as AIPerf counts them", rate or 0.0, note="never were 32 requests decoding at once"))
        return
    lost = 1 - share_of(under, pair.context, pair.decode_s)["mean"]
    inside = 1 - under.inside
    figures.append(
        Figure(
            "server's overhead of its step time, AIPerf on the same cores", 100 * lost, "%",
            note=f"outside the decode step {100 * inside:.1f} %; event loop {aiperf_loop_s:.1f} s of CPU; AIPerf counts "
            f"{rate or 0:.1f} tokens/s, prefill included",
        )
    )  # fmt: skip


def _in_turns(server: ServerProcess, bodies: Sequence[Any], pairs: PairedSteps) -> tuple[list[Answer], list[float], float]:
    """The server answers all requests at once and is halted about once a second, while the two sides of `pairs` take some
    steps: so all three see the same machine. Also when it was halted or went on, and for how many seconds in all."""
    stops: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, bodies, CONCURRENCY)
        while not wait([asked], 0.8).done:
            with server.halted():
                stops.append(time.monotonic())
                pairs.take(6)
                stops.append(time.monotonic())
    return asked.result(), stops, sum(stops[1::2]) - sum(stops[::2])


def _aiperf(setting: Setting, server: ServerProcess, osl: int) -> dict[str, Any] | None:
    if setting.aiperf is None:
        return None
    count = CONCURRENCY if setting.quick else 2 * CONCURRENCY
    return aiperf(
        setting.aiperf, server, "--model", NAME, "--endpoint-type", "chat", "--streaming", "--tokenizer", str(setting.folder),
        "--isl", str(ISL), "--osl", str(osl), "--concurrency", str(CONCURRENCY), "--request-count", str(count),
        "--extra-inputs", "ignore_eos:true", "--random-seed", "0",
    )  # fmt: skip


def _tokens_per_s(answers: Sequence[Answer]) -> float:
    return sum(a.tokens for a in answers) / (max(a.end_s or 0.0 for a in answers) - min(a.sent_s for a in answers))


def _texts(count: int, seed: int) -> list[str]:
    """Prompts of some 64 tokens, in words that every tokenizer spells alike."""
    return [" ".join(str((seed * 31 + i * 7919 + j * 104729) % 97) for j in range(23)) for i in range(count)]


def beside_transformers(setting: Setting, figures: list[Figure], details: dict[str, Any]) -> None:
    """Tokens/s of the whole server beside `transformers serve`, in the faster of its two modes, on the same requests."""
    osl = 8 if setting.quick else OSL
    counts = {1: 1, 8: 8} if setting.quick else {1: 1, 8: 8, 32: 32}
    bodies = {c: _texts(n, c) for c, n in counts.items()}
    options = ("--name", NAME, "--dtype", "float16")
    speeds: dict[str, dict[int, float]] = {}
    with tandem_server(str(setting.folder), setting.scratch, *options, threads=setting.threads) as server:
        server.ask(_ours(_texts(2, 99), 4), 2)
        answers = {c: server.ask(_ours(bodies[c], osl), c) for c in counts}
        speeds["tandem"] = {c: _tokens_per_s(a) for c, a in answers.items()}
    modes = {"one by one": (), "continuous batching": ("--continuous-batching",)}
    for mode, switches in modes.items():
        try:
            with transformers_server(setting.peer_folder, setting.scratch, *switches, threads=setting.threads) as server:
                ask = _peer(setting, osl, server)
                ask(_texts(1, 99), 1)
                speeds[mode] = {c: _tokens_per_s(ask(bodies[c], c)) for c in counts if c < 32}
                slower = any(speeds[mode][8] < other[8] for name, other in speeds.items() if name in modes and name != mode)
                if 32 in counts and mode == "continuous batching" and not slower:
                    speeds[mode][32] = _tokens_per_s(ask(bodies[32], 32))
        except (RuntimeError, subprocess.SubprocessError) as wrong:
            details[f"{mode} failed"] = str(wrong)
    if 32 in counts and "one by one" in speeds and not any(32 in speeds.get(mode, {}) for mode in modes):
        with transformers_server(setting.peer_folder, setting.scratch, threads=setting.threads) as server:
            ask = _peer(setting, osl, server)
            ask(_texts(1, 99), 1)
            speeds["one by one"][32] = _tokens_per_s(ask(bodies[32], 32))
    details["tokens_per_s"] = speeds
    for c in counts:
        best = max((speeds[mode].get(c, 0.0), mode) for mode in modes if mode in speeds)
        figures.append(
            Figure(
                f"tokens/s of those of transformers serve, {c} concurrent", speeds["tandem"][c] / best[0], "x",
                2.5 if c == CONCURRENCY else None, at_least=True,
                note=f"{speeds['tandem'][c]:.1f} against {best[0]:.1f} ({best[1]})"
                + "".join(f", {speeds[m][c]:.1f} ({m})" for m in modes if m != best[1] and c in speeds.get(m, {})),
            )
        )  # fmt: skip


def _peer(setting: Setting, osl: int, server: ServerProcess) -> Callable[[Sequence[str], int], list[Answer]]:
    """Asks transformers' server, which serves one model under its path, and must give as many tokens as ours."""

    def ask(prompts: Sequence[str], concurrency: int) -> list[Answer]:
        bodies = _bodies(prompts, osl, model=str(setting.peer_folder))
        answers = server.ask(bodies, concurrency)
        if any(answer.tokens != osl for answer in answers):
            raise server.fail(f"transformers gave {[a.tokens for a in answers]} tokens instead of {osl} each")
        return answers

    return ask


def handoff(setting: Setting, figures: list[Figure], details: dict[str, Any]) -> None:
    """benchmarks/handoff.py, as it is."""
    command = [sys.executable, str(HERE / "handoff.py"), "3" if setting.quick else "15"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: float(ms) for name, ms in re.findall(r"^\s*(\w+)\s+([\d.]+) ms", text, re.MULTILINE)}
    details["ms"] = found
    figures.append(
        Figure(
            "hand-off of 64 MiB between processes", found["way"], "ms", 20,
            note=f"from the last prefill pass to the receiver's own copy; sender's copies behind the prefill {found['sender']} "
            f"ms in all, a plain memcpy {found['memcpy']} ms",
        )
    )  # fmt: skip


def prefix(setting: Setting, figures: list[Figure], details: dict[str, Any]) -> None:
    """TTFT of a prompt of which 2,048 tokens were served before, in a Transformer and a hybrid, and through HTTP."""
    rounds = setting.rounds
    for kind in ("transformer", "hybrid"):
        folder = setting.folder if kind == "transformer" else write_hybrid(setting.scratch, HYBRID)
        model = tandem.load_model(folder, dtype="float16")
        engine = new_engine(model, None, threads=setting.threads, max_context=4096)
        details[kind] = found = prefix_savings(engine, model.spec.vocab_size, rounds)
        figures.append(_saved(f"prefix hit cuts TTFT, {kind}, engine", found))
        del engine, model
    options = ("--name", NAME, "--dtype", "float16")
    with tandem_server(str(setting.folder), setting.scratch, *options, threads=setting.threads) as server:
        server.ask(_ours(prompts_of(1, ISL, 1000, 7), 4), 1)
        cold, warm = [], []
        for number in range(rounds):
            (shared,) = prompts_of(1, SHARED, 40000, 300 + number)
            ends = prompts_of(4, TAIL, 40000, 400 + number)
            took = [
                (a.first_s or 0.0) - a.sent_s for end in ends for a in server.ask(_ours([shared + end], 2), 1)
            ]  # one after another
            cold.append(took[0])
            warm.extend(took[1:])
    found = {"cold_ttft_s": statistics.median(cold), "warm_ttft_s": statistics.median(warm)}
    details["http"] = found | {"ratio": found["cold_ttft_s"] / found["warm_ttft_s"]}
    figures.append(_saved("prefix hit cuts TTFT, transformer, HTTP", details["http"]))


def _saved(name: str, found: dict[str, Any]) -> Figure:
    note = f"{1e3 * found['cold_ttft_s']:.0f} ms to {1e3 * found['warm_ttft_s']:.0f} ms"
    return Figure(name, found["ratio"], "x", 5, at_least=True, note=note)


def idle(setting: Setting, figures: list[Figure], details: dict[str, Any]) -> None:
    """Memory of a server while 1,000 streams are open whose clients read nothing; allocator as it comes."""
    count = 50 if setting.quick else STREAMS
    options = ("--name", NAME, "--dtype", "float16", "--cache-bytes", str(IDLE_CACHE_BYTES))
    env = plain_environment()
    with tandem_server(str(setting.folder), setting.scratch, *options, threads=setting.threads, env=env) as server:
        server.ask(_ours(prompts_of(2, ISL, 40000, 7), 4), 2)
        before = server.status_bytes("VmRSS")
        url, prompts = server.url + "/v1/completions", prompts_of(count, ISL, 40000, 500)
        streams = [
            connect(url, json.dumps(body).encode(), receive_bytes=4096) for body in _ours(prompts, 1500)
        ]  # small buffers, so that what is not read stays with the server
        most, deadline = 0, time.monotonic() + (4 if setting.quick else 20)
        while time.monotonic() < deadline:
            most = max(most, server.status_bytes("VmRSS"))
            time.sleep(0.25)
        answering = sum(_alive(stream) for stream in streams)
        with urllib.request.urlopen(server.url + "/metrics", timeout=10) as page:
            text = page.read().decode()
        running = sum(float(v) for v in re.findall(r"^tandem_num_requests_running\S* (\S+)", text, re.MULTILINE))
        for stream in streams:
            stream.close()
        time.sleep(2)
        after = server.status_bytes("VmRSS")
    details.update(before_bytes=before, most_bytes=most, after_bytes=after, answering=answering, running=running)
    figures.append(
        Figure(
            f"{count:,} idle streams beyond the model", (most - before + IDLE_CACHE_BYTES) / 2**20, "MiB", 1024,
            note=f"a cache of {IDLE_CACHE_BYTES >> 20} MiB in it; "
            f"{before / 2**20:.0f} MiB before, {most / 2**20:.0f} at most, {after / 2**20:.0f} after they closed; "
            f"{answering} had begun to answer, "
            f"{running:.0f} ran, the others waited",
        )
    )  # fmt: skip


def _alive(stream: socket.socket) -> bool:
    """Whether an answer has begun. Raises RuntimeError where the server has ended or refused the stream."""
    if not select.select([stream], [], [], 0)[0]:
        return False
    head = stream.recv(64, socket.MSG_PEEK)
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"a stream was not held: {head!r}")
    return True


PARTS: dict[str, Callable[[Setting, list[Figure], dict[str, Any]], None]] = {
    "overhead": overhead,
    "transformers": beside_transformers,
    "handoff": handoff,
    "prefix": prefix,
    "idle": idle,
}
