"""The explorer: answers are the planner's, the API refuses in one line, the page is one file that escapes what it carries."""

from __future__ import annotations

import json
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hosts import keep_a_host

import tandem
from tandem.explore import page as pages
from tandem.explore.answers import GRID_ISL, GRID_OSL, GRID_TPOT_S, Query, answer, catalogue, exported
from tandem.plan.planner import WORTH_SPLITTING
from tandem.plan.rates import TOLERANCE
from tandem.spec.catalog import hardware_names, model_names, released_names
from tandem.spec.design import BACKENDS
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Workload

pytest.importorskip("fastapi", reason="pip install tandem-lm[explore]")
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from tandem.explore import app as explorer
from tandem.explore.app import create_app, router

QWEN = Query(model="Qwen/Qwen3-8B", hardware="h100-sxm", gpus=4, isl=1024, osl=128, ttft_s=1.0, tpot_s=0.02)
PARAMS = {name: getattr(QWEN, name) for name in QWEN.__dataclass_fields__ if getattr(QWEN, name) is not None}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app())


def test_an_answer_is_the_plan() -> None:
    plan = tandem.find_plan(
        model=QWEN.model, hardware=QWEN.hardware, gpus=4, workload=Workload.fixed(1024, 128), slo=Slo(ttft_s=1.0, tpot_s=0.02)
    )
    found = json.loads(json.dumps(answer(QWEN), allow_nan=False))
    assert found["recommended"] == plan.recommended.to_json()
    assert found["best"]["tokens_per_s"] == plan.best.tokens_per_s
    assert len(found["frontier"]) == len(plan.frontier)
    for row, option in zip(found["frontier"], plan.frontier, strict=True):
        assert (row["mode"], row["gpu"]) == (option.deployment.mode, option.tokens_per_s_per_gpu.value)
        assert row["low"] <= row["gpu"] <= row["high"]
        assert row["what"].count(" x ") == len(option.deployment.pools)
    held = found["best"]["memory"]
    assert all(sum(v for k, v in pool.items() if k != "usable_bytes") <= pool["usable_bytes"] for pool in held.values())
    assert found["why"][0].startswith("recommended: ")


@pytest.mark.parametrize("model", [QWEN.model, "openai/gpt-oss-120b", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"])
def test_a_rough_answer_is_near_the_whole_one_and_of_fewer_points(model: str) -> None:
    """A batch size between two that are priced is at most one of its steps, 12 %, from the lower; the whole answer may
    prefer a balanced pair, or one pool where two gain little, to what serves the most."""
    whole, rough = (answer(replace(QWEN, model=model, gpus=16, rough=flag)) for flag in (False, True))
    assert (whole["rough"], rough["rough"]) == (False, True)
    assert rough["points"] < 0.4 * whole["points"]
    assert 0.85 <= rough["best"]["tokens_per_s"] / whole["best"]["tokens_per_s"] <= WORTH_SPLITTING / (1 - TOLERANCE)


def test_what_cannot_be_served_is_one_line() -> None:
    found = answer(Query(model="meta-llama/Meta-Llama-3.1-70B", hardware="a10g", gpus=1, isl=1024, osl=128))
    assert list(found) == ["error"]
    assert "\n" not in found["error"]
    with pytest.raises(SpecError, match="gpus=0"):
        Query(model=QWEN.model, hardware=QWEN.hardware, gpus=0, isl=1, osl=2)


def test_the_catalogue_can_be_chosen_from() -> None:
    found = catalogue()
    assert {"Qwen/Qwen3-8B", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"} <= {row["name"] for row in found["models"]}
    assert "h100-sxm" in {row["name"] for row in found["hardware"]}
    assert [row["name"] for row in found["models"]] == [*model_names(), *released_names()]
    assert {tuple(row["backends"]) for row in found["hardware"]} == {BACKENDS}
    json.dumps(found, allow_nan=False)


def test_a_model_that_was_trained_here_can_be_chosen(client: TestClient) -> None:
    assert "nano-hybrid" in released_names()
    done = client.get("/api/plan", params={**PARAMS, "model": "nano-hybrid", "hardware": "a10g", "gpus": 1})
    assert done.status_code == 200
    assert (done.json()["model"], done.json()["hardware"]) == ("nano-hybrid", "a10g")


def test_this_machine_can_be_chosen_where_it_was_measured(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own engine, and no more workers than it has; a price nobody knows, so no budget."""
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    assert [row["name"] for row in catalogue()["hardware"]] == [*hardware_names()]
    keep_a_host()
    keep_a_host("host-1")
    rows = {row["name"]: row for row in catalogue()["hardware"]}
    assert list(rows) == [*hardware_names(), "host", "host-1"]
    assert (rows["host-1"]["backends"], rows["host-1"]["price_per_hour_usd"]) == (["tandem"], None)
    asked: dict[str, Any] = {"model": "nano-hybrid", "hardware": "host", "gpus": 1, "isl": 64, "osl": 64}
    found = client.get("/api/plan", params=asked).json()
    assert (found["recommended"]["backend"], found["price_per_hour_usd"]) == ("tandem", None)
    for changes, told in (
        ({"gpus": 2}, "gpus=2"),
        ({"backend": "vllm"}, "backend='vllm'"),
        ({"budget_usd_per_hour": 5}, "host has no price"),
        ({"hardware": "host-3"}, "not in the catalogue"),
    ):
        refused = client.get("/api/plan", params={**asked, **changes})
        assert refused.status_code == 400
        assert told in refused.json()["error"]
        assert "\n" not in refused.json()["error"]
    (tmp_path / "host.json").write_text('{"host": {}}')
    assert [row["name"] for row in catalogue()["hardware"]] == [*hardware_names()]
    assert list(client.get("/api/plan", params=asked).json()) == ["error"]


@pytest.mark.parametrize(("budget", "paid"), [(6.88, 1), (3 * 6.88, 3), (27.0, 3), (1000.0, 145)])
def test_a_budget_pays_for_so_many_gpus(budget: float, paid: int) -> None:
    found = answer(replace(QWEN, budget_usd_per_hour=budget))
    within = answer(replace(QWEN, gpus=min(4, paid)))
    assert (found["paid_gpus"], found["gpus"]) == (paid, min(4, paid))
    assert found["recommended"] == within["recommended"]
    assert found["price_per_hour_usd"] <= budget * (1 + 1e-9)
    assert found["why"][1].endswith(f"pay for {paid} x h100-sxm at 6.88: planned within {min(4, paid)} of 4 GPUs")
    assert within["paid_gpus"] is None


def test_a_budget_below_one_gpu_is_refused(client: TestClient) -> None:
    for budget, told in (("6.87", "one h100-sxm costs 6.88 USD an hour"), ("-1", "above 0"), ("nan", "above 0")):
        refused = client.get("/api/plan", params={**PARAMS, "budget_usd_per_hour": budget})
        assert refused.status_code == 400
        assert refused.json()["error"].startswith("budget_usd_per_hour=")
        assert told in refused.json()["error"]


def test_a_question_that_its_page_has_moved_on_from_is_not_planned(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, free, planned = Event(), Event(), []

    def slowly(query: Query) -> dict[str, Any]:
        planned.append(query.gpus)
        begun.set()
        assert free.wait(30)
        return answer(query)

    monkeypatch.setattr(explorer, "answer", slowly)

    def ask(visit: str, move: int, gpus: int) -> int:
        return client.get("/api/plan", params={**PARAMS, "gpus": gpus, "visit": visit, "move": move}).status_code

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, "one", 1, 1)
        assert begun.wait(30)
        second, third = pool.submit(ask, "one", 2, 2), pool.submit(ask, "one", 3, 3)
        other = pool.submit(ask, "another", 1, 4)
        assert second.result(30) == 204
        free.set()
        assert [each.result(30) for each in (first, third, other)] == [200] * 3
    assert sorted(planned) == [1, 3, 4]
    assert client.get("/api/plan", params={**PARAMS, "visit": "x" * 65}).status_code == 422
    assert client.get("/api/plan", params={**PARAMS, "move": -1}).status_code == 422


def test_the_api_answers_and_refuses(client: TestClient) -> None:
    done = client.get("/api/plan", params=PARAMS)
    assert done.status_code == 200
    assert {**done.json(), "seconds": 0, "why": 0} == {**answer(QWEN), "seconds": 0, "why": 0}
    assert client.get("/api/catalogue").json() == {**json.loads(json.dumps(catalogue())), "live": None}
    for changes, told in (
        ({"model": "/etc/passwd"}, "not in the catalogue"),
        ({"hardware": "host.yaml"}, "not in the catalogue"),
        ({"gpus": 0}, "gpus=0"),
        ({"tpot_s": -1}, "tpot_s=-1"),
        ({"osl": 1}, "osl=1"),
        ({"backend": "other"}, "backend='other'"),
        ({"model": "meta-llama/Meta-Llama-3.1-70B", "hardware": "a10g", "gpus": 1}, "a10g"),
    ):
        refused = client.get("/api/plan", params={**PARAMS, **changes})
        assert refused.status_code == 400
        assert told in refused.json()["error"]
        assert "\n" not in refused.json()["error"]
    assert client.get("/api/plan", params={**PARAMS, "gpus": "many"}).status_code == 422
    assert client.get("/api/plan", params={**PARAMS, "model": "x" * 201}).status_code == 422


def test_nothing_can_be_changed(client: TestClient) -> None:
    for path in ("/", "/api/plan", "/api/catalogue", "/api/measured"):
        for method in ("post", "put", "delete", "patch"):
            assert getattr(client, method)(path).status_code == 405


def test_the_page_is_one_file_that_asks_nobody_else(client: TestClient) -> None:
    served = client.get("/")
    policy = served.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    text = served.text
    assert text == pages.page()
    assert text.count(pages.MARK) == 1
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))


def test_the_page_was_built_from_the_sources_that_lie_here() -> None:
    tools = Path(__file__).parents[2] / "tools" / "explorer_page.py"
    found = runpy.run_path(str(tools))
    assert pages.page().endswith(found["sources_mark"]()), "web/ was changed: run `make web`"


def test_predictions_stand_beside_what_was_measured_here(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops of this machine are priced by the fit that is kept; what another version wrote is left out."""
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    gpus = list(client.get("/api/measured").json().get("rows", ()))
    model = keep_a_host()
    rows = client.get("/api/measured").json()["rows"][len(gpus) :]
    groups = ["this machine"] * 4 + ["this machine, two pools"] * 2
    assert [row["group"] for row in rows] == groups
    assert sorted(row["metric"] for row in rows) == ["tpot_s"] * 3 + ["ttft_s"] * 3
    found = tandem.estimate(
        model=model, hardware="host", isl=64, osl=64, concurrency=4, precision="fp32/bf16/fp32", backend="tandem"
    )
    assert next(row for row in rows if row["metric"] == "tpot_s")["predicted"] == pytest.approx(found.tpot_s.value)
    (tmp_path / "host.json").write_text('{"host": {}}')
    assert client.get("/api/measured").json().get("rows", []) == gpus


def test_a_server_may_want_a_key_before_it_plans() -> None:
    """The page is for everybody; what it asks goes through the server's own dependency."""

    def nobody() -> str:
        raise HTTPException(401)

    app = FastAPI()
    app.include_router(router(prefix="/explore", client_of=nobody, live="../pools"))
    asks = TestClient(app)
    assert asks.get("/explore/").status_code == 200
    for path in ("catalogue", "plan", "measured"):
        assert asks.get(f"/explore/api/{path}", params=PARAMS).status_code == 401
    app = FastAPI()
    app.include_router(router(prefix="/explore", live="../pools"))
    assert TestClient(app).get("/explore/api/catalogue").json()["live"] == "../pools"


def test_an_exported_page_holds_its_answers_and_escapes_them() -> None:
    found = exported(QWEN)
    assert len(found["answers"]) == len(GRID_ISL) * len(GRID_OSL) * len(GRID_TPOT_S)
    assert set(found["answers"]) >= {"512/128/", "512/128/0.02", "32768/8192/0.1"}
    asked = Query(**{**PARAMS, "isl": 2048, "osl": 512, "tpot_s": 0.02})
    assert found["answers"]["2048/512/0.02"]["recommended"] == answer(asked)["recommended"]
    text = pages.exported_page({**found, "catalogue": {"models": [{"name": "</script><script>alert(1)</script>"}]}})
    assert text.count("</script>") == pages.page().count("</script>")
    inside = re.search(r'<script type="application/json" id="answers">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    assert json.loads(inside[1])["catalogue"]["models"][0]["name"] == "</script><script>alert(1)</script>"
    with pytest.raises(SpecError, match="no-such-model"):
        exported(Query(**{**PARAMS, "model": "no-such-model"}))
