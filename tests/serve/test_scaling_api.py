"""Scaling as operators see it: over HTTP and in the options, with emulated workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from fake_frontend import FakeFrontend
from live_server import Live, eventually
from small_models import small_model
from toy_tokenizer import toy_tokenizer
from typer.testing import CliRunner

from tandem.cli.app import app
from tandem.model.load import save_model
from tandem.serve.launch import Emulation, Launched, Scaling, ServeOptions, deployment_of
from tandem.serve.observe import of_line
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo

SLO = Slo(ttft_s=1.0)
KEY = {"authorization": "Bearer long-and-random"}


def options(scaling: Scaling | None, *, prefill: int = 1, decode: int = 2, **more: Any) -> ServeOptions:
    deployment = deployment_of("qwen3-8b", "h100", prefill=prefill, decode=decode, max_batch=16)
    return ServeOptions(
        model="qwen3-8b",
        name="q",
        prefill=prefill,
        decode=decode,
        emulation=Emulation(deployment=deployment, start_up_s=0.01, stride_s=0.05),
        scaling=scaling,
        **more,
    )


@contextmanager
def serving(chosen: ServeOptions) -> Iterator[tuple[Live, Launched]]:
    launched = Launched(chosen)
    live = Live(cast("FakeFrontend", launched.pools), launched.app, 1.0)
    live.start()
    try:
        yield live, launched
    finally:
        live.close()


def hurry(launched: Launched, **limits: Any) -> None:
    """Let the policy decide from the first window on: in an hour's traffic it would not have to."""
    from dataclasses import replace

    policy: Any = cast("Any", launched.controller)._policy
    policy.limits = replace(policy.limits, warm_s=0.0, dwell_s=0.0, down_s=0.0, start_up_s=0.05, **limits)


def fill(live: Live, *, isl: int = 6000, osl: int = 2, count: int = 12) -> None:
    body = {"model": "q", "prompt": [[i + 3] * isl for i in range(count)], "max_tokens": osl}
    answer = live.http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == osl * count


def test_workers_come_with_the_load_and_people_can_stop_that(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    scaling = Scaling(slo=SLO, mode="elastic", max_workers=6, window_s=0.1, log=log)
    with serving(options(scaling)) as (live, launched):
        assert live.http.get("/pools").json()["mode"] == "running"
        paused = live.http.post("/pools/pause").json()
        assert paused["mode"] == "paused"
        hurry(launched)
        fill(live)
        state = live.http.get("/pools").json()
        assert [worker["id"] for worker in state["workers"]] == ["prefill-0", "decode-1", "decode-2"]
        known = len(state["decisions"])
        assert live.http.post("/pools/resume").json()["mode"] == "running"

        def grown() -> bool:
            fill(live)
            decisions = live.http.get("/pools").json()["decisions"]
            return any(": started as" in step for decision in decisions for step in decision["steps"])

        eventually(grown)
        state = live.http.get("/pools").json()
        assert len(state["decisions"]) > known
        assert len(state["workers"]) > 3
        assert len(state["workers"]) <= 6
        fill(live, isl=100)
        assert live.http.get("/ready").status_code == 200
    lines = log.read_text().splitlines()
    assert len(lines) >= 2
    assert all(of_line(line).window_s > 0.0 for line in lines)


def test_dry_runs_say_what_they_would_do() -> None:
    scaling = Scaling(slo=SLO, mode="elastic", max_workers=6, window_s=0.1, dry_run=True)
    with serving(options(scaling)) as (live, launched):
        hurry(launched)
        assert live.http.get("/pools").json()["mode"] == "dry-run"
        before = len(live.http.get("/pools").json()["workers"])

        def told() -> bool:
            fill(live)
            decisions = live.http.get("/pools").json()["decisions"]
            return any(step.startswith("would start a prefill") for decision in decisions for step in decision["steps"])

        eventually(told)
        assert len(live.http.get("/pools").json()["workers"]) == before


def test_co_located_workers_are_scaled_too() -> None:
    scaling = Scaling(slo=Slo(tpot_s=0.02), mode="elastic", max_workers=4, window_s=0.1)
    with serving(options(scaling, prefill=0, decode=1)) as (live, launched):
        hurry(launched)

        def grown() -> bool:
            fill(live, count=16)
            return len(live.http.get("/pools").json()["workers"]) > 1

        eventually(grown)
        assert {worker["role"] for worker in live.http.get("/pools").json()["workers"]} == {"colocated"}


def test_workers_that_compute_are_scaled_too(tmp_path: Path) -> None:
    save_model(small_model("hybrid"), tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    chosen = ServeOptions(
        model=str(tmp_path), name="q", threads=1, cache_bytes=1 << 20, max_batch=2, dtype="float32",
        scaling=Scaling(slo=Slo(ttft_s=1e-5, tpot_s=1e-4), max_workers=3, window_s=0.1),
    )  # fmt: skip
    with serving(chosen) as (live, launched):
        hurry(launched)
        body = {"model": "q", "prompt": [[5, 6, 7, i] for i in range(8)], "max_tokens": 12, "ignore_eos": True, "seed": 4}
        answers = []

        def grown() -> bool:
            answers.append([c["text"] for c in live.http.post("/v1/completions", json=body).json()["choices"]])
            decisions = live.http.get("/pools").json()["decisions"]
            return any(": started as" in step for decision in decisions for step in decision["steps"])

        eventually(grown)
        for _ in range(3):
            grown()
        assert 2 <= len(live.http.get("/pools").json()["workers"]) <= 3
        assert all(answer == answers[0] for answer in answers)


def test_only_those_with_a_key_see_and_stop_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one:" + hashlib.sha256(b"long-and-random").hexdigest())
    with serving(options(Scaling(slo=SLO), api_keys=keys)) as (live, launched):
        for method, path in (("GET", "/pools"), ("POST", "/pools/pause"), ("POST", "/pools/resume")):
            assert live.http.request(method, path).status_code == 401
            assert live.http.request(method, path, headers=KEY).status_code == 200
        assert launched.controller is not None
        assert not launched.controller.paused
        assert live.http.get("/pools/pause", headers=KEY).status_code == 405


def test_pages_of_other_sites_change_nothing() -> None:
    """A visitor's browser would send what a page tells it to; it names the page's site."""
    with serving(options(Scaling(slo=SLO, mode="fixed", window_s=60.0))) as (live, _):
        for path in ("/pools/pause", "/pools/resume"):
            refused = live.http.post(path, headers={"origin": "http://elsewhere.example"})
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "cross_site"
        assert live.http.get("/pools").json()["mode"] == "running"
        own = str(live.http.base_url).rstrip("/")
        assert live.http.post("/pools/pause", headers={"origin": own}).json()["mode"] == "paused"


def test_what_clients_felt_lately_is_told() -> None:
    with serving(options(None)) as (live, _):
        recent = live.http.get("/pools").json()["recent"]
        assert (recent["requests"], recent["ttft_s"], recent["tpot_s"]) == (0, None, None)
        fill(live, isl=100, osl=4, count=3)
        state = live.http.get("/pools").json()
        assert state["recent"]["requests"] == 3
        assert state["recent"]["tokens_per_s"] == pytest.approx(12 / state["recent"]["window_s"])
        for name in ("ttft_s", "tpot_s"):
            assert 0 < state["recent"][name]["p50"] <= state["recent"][name]["p90"]
        assert {worker["waiting"] for worker in state["workers"]} == {0}
        assert all(worker["free_tokens"] > 0 and worker["max_batch"] > 0 for worker in state["workers"])


def test_without_a_controller_there_is_nothing_to_pause() -> None:
    with serving(options(None)) as (live, _):
        assert live.http.get("/pools").json()["mode"] == "off"
        refused = live.http.post("/pools/pause")
        assert refused.status_code == 409
        assert "--scale" in refused.json()["error"]["message"]
        described = live.http.get("/openapi.json").json()["paths"]
        assert set(described["/pools/pause"]["post"]["responses"]) == {"200", "401", "403", "409"}
        assert "409" not in described["/v1/completions"]["post"]["responses"]


@pytest.mark.parametrize(
    ("field", "made"),
    [
        ("scale", lambda: Scaling(slo=Slo())),
        ("scale", lambda: Scaling(slo=SLO, mode=cast("Any", "up"))),
        ("max_workers", lambda: Scaling(slo=SLO, mode="fixed", max_workers=3)),
        ("max_workers", lambda: options(Scaling(slo=SLO, max_workers=2))),
        ("scale_log", lambda: Scaling(slo=SLO, log=Path("no/such/folder/log"))),
        ("emulate", lambda: options(None, workers="processes")),
        ("emulate", lambda: options(None, cache_bytes=1 << 30)),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(field: str, made: Any) -> None:
    with pytest.raises(SpecError, match=f"^{field}[=:]"):
        made()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--emulate-tp", "2"], "--emulate-tp"),
        (["--emulate", "h1000"], "h1000"),
        (["--max-workers", "4"], "--max-workers"),
        (["--emulate", "h100", "--scale", "elastic"], "--ttft"),
        (["--emulate", "h100", "--max-batch", "100000000"], "batch"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(words: list[str], named: str) -> None:
    found = CliRunner().invoke(app, ["serve", "qwen3-8b", *words])
    assert found.exit_code != 0
    text = str(found.exception) if isinstance(found.exception, SpecError) else found.output
    assert named in text
    assert "Traceback" not in text


def test_a_plan_of_several_gpus_a_worker_can_be_emulated(tmp_path: Path) -> None:
    spread = {"tp": 4, "pp": 1, "ep": 1, "dp": 1, "cpp": 1}
    file = tmp_path / "plan.json"
    pools = {
        "prefill": {"parallelism": spread, "batch": 1, "replicas": 2, "role": "prefill"},
        "decode": {"parallelism": spread, "batch": 64, "replicas": 3, "role": "decode"},
    }
    file.write_text(json.dumps({"recommended": {"model": "llama-3.1-70b", "hardware": "h100", **pools}}))
    made = deployment_of("llama-3.1-70b", "h100", prefill=9, decode=9, plan=file)
    launched = Launched(
        ServeOptions(model="llama-3.1-70b", name="l", prefill=2, decode=3, emulation=Emulation(deployment=made))
    )
    assert [m.role for m in launched.pools.workers.values()] == ["prefill"] * 2 + ["decode"] * 3
    assert made.gpus == 20
