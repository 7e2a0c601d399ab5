"""An export says what the plan says: parallelism, batch, chunk, formats, GPUs and hosts, in every backend's own words."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_cases import CASES, LLAMA, NANO, R1, plan_of, pool

from tandem.plan.export import benchmark, dynamo, llmd, ray, sglang, vllm
from tandem.plan.export.folder import MANIFEST, export_files, export_plan
from tandem.plan.export.job import PLACEHOLDER, TEMPLATE_TOKENS, Job, find_checkpoint, host_gpus, make_job
from tandem.plan.export.placement import num_nodes, place
from tandem.plan.planner import find_plan
from tandem.spec.catalog import hardware_names, load_spec
from tandem.spec.design import Deployment
from tandem.spec.workload import Workload, read_trace

every_case = pytest.mark.parametrize("case", CASES)


def job_of(case: str) -> Job:
    return make_job(plan_of(case))


def documents(case: str, path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(export_files(plan_of(case))[path]))


def commands(script: str, program: str) -> list[list[str]]:
    """Words of every call of a program in a script, one option a line."""
    joined = re.sub(r"\\\n\s*", " ", script)
    return [line.partition(program)[2].split() for line in joined.splitlines() if f"{program} " in line and "#" not in line]


def after(words: list[str], flag: str) -> str | None:
    """The word behind a flag."""
    return words[words.index(flag) + 1] if flag in words else None


@every_case
def test_every_file_is_what_it_claims_to_be(case: str, tmp_path: Path) -> None:
    names = export_plan(plan_of(case), tmp_path / "out")
    assert {"README.md", "nodes.env", "plan.json", MANIFEST, "vllm/run-node.sh", "sglang/router.sh"} <= set(names)
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == names
    for name in names:
        path = tmp_path / "out" / name
        text = path.read_text()
        assert text.endswith("\n")
        if name.endswith((".sh", ".env")):
            assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0, name
        elif name.endswith(".yaml"):
            assert all(isinstance(d, dict) for d in yaml.safe_load_all(text))
        elif name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".py"):
            compile(text, name, "exec")
        assert path.stat().st_mode & 0o777 == (0o755 if name.endswith(".sh") else 0o644)


@every_case
def test_each_gpu_of_the_plan_is_used_once_and_no_instance_is_torn(case: str) -> None:
    job = job_of(case)
    places = place(job)
    used = Counter((p.node, gpu) for p in places for gpu in p.gpus.split(","))
    assert set(used.values()) == {1}
    assert len(used) == job.plan.recommended.gpus
    per_node = job.instances[0].gpus_per_node
    assert all(int(gpu) < per_node for _, gpu in used)
    for i in job.instances:
        mine = [p for p in places if p.instance == i]
        assert len({(p.number) for p in mine}) == i.replicas
        assert all(len({p.node for p in mine if p.number == n}) == i.nodes for n in range(i.replicas))
    assert len({(p.node, p.slot) for p in places}) == len(places)
    assert num_nodes(places) >= math.ceil(job.plan.recommended.gpus / per_node)


@every_case
def test_vllm_is_told_the_plan(case: str) -> None:
    deployment, job = plan_of(case).recommended, job_of(case)
    script = export_files(plan_of(case))["vllm/run-node.sh"]
    calls = commands(script, "vllm serve")
    assert len(calls) == len(deployment.pools)
    for words, p in zip(calls, deployment.pools, strict=True):
        axes = p.parallelism
        assert after(words, "--tensor-parallel-size") == str(axes.tp)
        assert int(after(words, "--pipeline-parallel-size") or 1) == axes.pp * axes.cpp
        assert int(after(words, "--data-parallel-size") or 1) == axes.dp
        assert ("--enable-expert-parallel" in words) == (axes.ep > 1)
        seqs = int(after(words, "--max-num-seqs") or 0)
        assert p.batch <= seqs * axes.dp < p.batch + axes.dp
        tokens = int(after(words, "--max-num-batched-tokens") or 0)
        if p.role == "colocated" and p.chunk_tokens:
            assert tokens == p.chunk_tokens
        elif p.role == "prefill" and p.chunk_tokens:
            assert p.chunk_tokens <= tokens <= p.chunk_tokens + TEMPLATE_TOKENS * p.batch
        else:
            assert tokens >= (seqs if p.role == "decode" else 2048)
        assert int(after(words, "--max-model-len") or 0) >= 2048 + 256
        transfer = re.search(r'"kv_role": "(\w+)"', " ".join(words))
        roles = {"prefill": "kv_producer", "decode": "kv_consumer"}
        assert (transfer[1] if transfer else None) == roles.get(p.role)
    assert script.count("--max-cudagraph-capture-size") == sum(i.seqs > 512 for i in job.instances)


@every_case
def test_sglang_is_told_the_plan_in_its_own_counting(case: str) -> None:
    deployment = plan_of(case).recommended
    calls = commands(export_files(plan_of(case))["sglang/run-node.sh"], "sglang.launch_server")
    for words, p in zip(calls, deployment.pools, strict=True):
        axes = p.parallelism
        assert after(words, "--tp-size") == str(axes.tp * axes.dp)  # SGLang's tp spans its attention groups
        assert int(after(words, "--attn-dp-size") or 1) == axes.dp
        assert int(after(words, "--ep-size") or 1) == axes.ep
        assert int(after(words, "--pp-size") or 1) == axes.pp * axes.cpp
        assert after(words, "--disaggregation-mode") == (p.role if deployment.mode == "disaggregated" else None)
        assert ("--enable-mixed-chunk" in words) == (deployment.mode == "piggybacked")
        if p.role != "prefill":
            assert p.batch <= int(after(words, "--max-running-requests") or 0) < p.batch + axes.dp
        if p.role != "decode":
            chunk = int(after(words, "--chunked-prefill-size") or 0)  # divided by the groups, then by pages
            assert chunk % (axes.dp * sglang.PAGE) == 0
            assert (p.chunk_tokens or 2048) <= chunk / axes.dp
    older = [sglang.engine_flags(job_of(case), i, attention_dp=False) for i in job_of(case).instances]
    for flags, p in zip(older, deployment.pools, strict=True):
        assert (("--enable-dp-attention", None) in flags) == (p.parallelism.dp > 1)
        assert all(name != "--attn-dp-size" for name, _ in flags)


@every_case
def test_routers_know_every_instance_once(case: str) -> None:
    job, files = job_of(case), export_files(plan_of(case))
    for backend in ("vllm", "sglang"):
        script = files[f"{backend}/router.sh"]
        urls = re.findall(r'"http://\$\{NODES\[(\d+)\]\}:(\d+)"', script)
        assert len(set(urls)) == len(urls) == sum(i.replicas for i in job.instances)
        for i in job.instances:
            wanted = i.replicas if job.split else 0
            assert script.count(f"--{i.role} ") == wanted
        assert ("pd-disaggregation" in script) == job.split


@every_case
def test_the_graph_the_manifests_and_the_application_have_the_plans_pools(case: str) -> None:
    job, pools = job_of(case), plan_of(case).recommended.pools
    graph = documents(case, "dynamo/graph.yaml")[0]
    workers = graph["spec"]["components"][1:]
    servers = documents(case, "llm-d/model-servers.yaml")
    app = documents(case, "ray/serve.yaml")[0]["applications"][0]["args"]
    configs = list(app["llm_configs"] if "llm_configs" in app else app.values())
    for p, i, worker, server, config in zip(pools, job.instances, workers, servers, configs, strict=True):
        assert worker["replicas"] == server["spec"]["replicas"] == config["deployment_config"]["num_replicas"] == p.replicas
        assert worker.get("multinode", {"nodeCount": 1})["nodeCount"] == i.nodes
        main = worker["podTemplate"]["spec"]["containers"][0]
        nodes = server["spec"].get("leaderWorkerTemplate", {"size": 1})["size"]
        template = server["spec"].get("template") or server["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        for container, hosts in ((main, i.nodes), (template["spec"]["containers"][0], nodes)):
            assert int(container["resources"]["limits"]["nvidia.com/gpu"]) * hosts == p.parallelism.gpus
        kwargs = config["engine_kwargs"]
        assert kwargs["tensor_parallel_size"] == p.parallelism.tp
        assert kwargs["max_num_seqs"] * p.parallelism.dp >= p.batch
        if job.split:
            assert worker["type"] == p.role
            assert template["metadata"]["labels"]["llm-d.ai/role"] == p.role
            assert kwargs["kv_transfer_config"]["kv_connector"] == "NixlConnector"


@every_case
def test_kubernetes_objects_fit_together(case: str) -> None:
    names = set()
    for d in documents(case, "llm-d/model-servers.yaml"):
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(d)
        names.add(d["metadata"]["name"])
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", d["metadata"]["name"])
        if d["kind"] == "Deployment":
            templates = [d["spec"]["template"]]
            assert d["spec"]["selector"]["matchLabels"].items() <= templates[0]["metadata"]["labels"].items()
        else:
            group = d["spec"]["leaderWorkerTemplate"]
            templates = [group["leaderTemplate"], group["workerTemplate"]]
            heads = ["--headless" in t["spec"]["containers"][0]["args"] for t in templates]
            assert heads == [False, True]
        for t in templates:
            volumes = {v["name"] for v in t["spec"]["volumes"]}
            for c in t["spec"]["containers"] + t["spec"].get("initContainers", []):
                assert {m["name"] for m in c.get("volumeMounts", [])} <= volumes
                ports = {p["name"]: p["containerPort"] for p in c.get("ports", [])}
                probes = [c[k]["httpGet"]["port"] for k in c if k.endswith("Probe")]
                assert set(probes) <= set(ports)
                if "--port" in c.get("args", []) and ports:
                    assert after(c["args"], "--port") == str(ports["modelserver"])
        clients = [
            p for c in (templates[0]["spec"]["containers"] + templates[0]["spec"].get("initContainers", [])) for p in c["ports"]
        ]
        assert 8000 in {p["containerPort"] for p in clients}
    assert len(names) == len(plan_of(case).recommended.pools)
    values = documents(case, "llm-d/router-values.yaml")[0]["router"]
    picker = yaml.safe_load(values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]])
    used = {p["pluginRef"] for profile in picker["schedulingProfiles"] for p in profile["plugins"]}
    assert used <= {p["type"] for p in picker["plugins"]}
    assert values["modelServers"]["matchLabels"].items() <= llmd.labels(job_of(case), "decode").items()


def test_a_hybrid_moves_its_state_as_nixl_needs_it_and_keeps_it_in_fp32() -> None:
    files = export_files(plan_of("hybrid split"))
    for path in ("vllm/run-node.sh", "dynamo/graph.yaml", "llm-d/model-servers.yaml", "ray/serve.yaml"):
        assert "VLLM_SSM_CONV_STATE_LAYOUT" in files[path], path
    assert "VLLM_SSM_CONV_STATE_LAYOUT" not in export_files(plan_of("hybrid"))["vllm/run-node.sh"]
    assert files["vllm/run-node.sh"].count("--mamba-ssm-cache-dtype float32") == 2
    assert files["sglang/run-node.sh"].count("--mamba-ssm-dtype float32") == 2
    assert "mamba" not in export_files(plan_of("dense"))["vllm/run-node.sh"]


FORMATS = [
    # model, weights asked for, checkpoint, quantised while loading
    (LLAMA, "bf16", LLAMA, False),
    (LLAMA, "fp8", LLAMA, True),
    (LLAMA, "fp4", None, False),
    (NANO, "fp8", "nvidia/NVIDIA-Nemotron-Nano-9B-v2-FP8", False),
    (NANO, "fp4", "nvidia/NVIDIA-Nemotron-Nano-9B-v2-NVFP4", False),
    (R1, "fp8_block", R1, False),
    (R1, "fp4", "nvidia/DeepSeek-R1-FP4", False),
    (R1, "bf16", None, False),
    ("openai/gpt-oss-120b", "mxfp4", "openai/gpt-oss-120b", False),
    ("Qwen/Qwen3-8B", "fp8_block", "Qwen/Qwen3-8B-FP8", False),
]


@pytest.mark.parametrize(("model", "weights", "name", "online"), FORMATS)
def test_weights_are_the_published_ones_in_that_format_where_there_are_any(
    model: str, weights: str, name: str | None, online: bool
) -> None:
    found = find_checkpoint(load_spec(model), weights)
    assert (found.name, found.online) == (name, online)
    assert (found.note is None) == (name == model and not online)


def test_formats_become_flags_only_where_the_checkpoint_does_not_say_them() -> None:
    def formats(case: str) -> tuple[list[Any], list[Any]]:
        return vllm.FORMATS.flags(job_of(case)), sglang.FORMATS.flags(job_of(case))

    assert formats("dense") == ([], [])
    assert formats("dense piggybacked") == (
        [("--quantization", "fp8"), ("--kv-cache-dtype", "fp8")],
        [("--quantization", "fp8"), ("--kv-cache-dtype", "fp8_e4m3")],
    )
    assert formats("experts fp4 on a rack") == ([("--kv-cache-dtype", "fp8")], [("--kv-cache-dtype", "fp8_e4m3")])


def test_weights_that_nobody_published_must_be_named_by_the_user(tmp_path: Path) -> None:
    plan = find_plan(model=LLAMA, hardware="b200-sxm", gpus=4, workload=Workload.fixed(1024, 128), precision="fp4")
    files = export_files(plan)
    assert PLACEHOLDER in files["dynamo/graph.yaml"]
    assert "set MODEL" in files["README.md"]
    export_plan(plan, tmp_path / "out")
    done = subprocess.run(["bash", str(tmp_path / "out/vllm/run-node.sh"), "0"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set it to a checkpoint in fp4" in done.stderr


LIMITS = [
    ("dense pipelines", vllm, "will not start: NIXL takes no pipeline stages in the decode pool (pp2)"),
    ("dense pipelines", vllm, "cpp4 becomes 4 pipeline stages"),
    ("dense pipelines", dynamo, "the plan is for trtllm"),
    ("windows split", vllm, "NixlPushConnector"),
    ("windows split", sglang, "pools of equal tp"),
    ("experts fp4 on a rack", vllm, "ep2 with experts cut 2 ways becomes ep4"),
    ("experts split", llmd, "dp16 over 4 hosts"),
    ("dense split", ray, "demands vLLM"),
]


@pytest.mark.parametrize(("case", "backend", "words"), LIMITS)
def test_what_a_backend_cannot_express_is_said_where_people_look(case: str, backend: Any, words: str) -> None:
    found = backend.limits(job_of(case))
    assert any(words in line for line in found)
    files = export_files(plan_of(case))
    assert words in files["README.md"]
    blocking = [line for line in found if line.startswith("will not")]
    assert all(any(line in text for name, text in backend.files(job_of(case)).items()) for line in blocking)


def test_kv_heads_copied_over_a_wide_prefill_pool_cannot_be_read_by_a_narrow_one() -> None:
    plan = plan_of("dense split")
    wide = replace(plan.recommended, prefill=pool("prefill", 2, 1, tp=16), decode=pool("decode", 8, 1, tp=4))
    job = make_job(replace(plan, best=replace(plan.best, deployment=wide)))
    assert any(line.startswith("will not connect") for line in vllm.limits(job))
    assert not any(line.startswith("will not") for line in vllm.limits(job_of("dense split")))


@pytest.mark.parametrize("name", hardware_names())
def test_hosts_are_boxes_of_8_or_trays_of_4(name: str) -> None:
    from tandem.spec.catalog import load_hardware

    assert host_gpus(load_hardware(name).scale_up_gpus) == (4 if name.startswith("gb") else 8)


def test_the_benchmark_sends_the_planned_traffic() -> None:
    plan = plan_of("dense split")
    flags = dict(benchmark.aiperf_flags(make_job(plan)))
    assert flags["--synthetic-input-tokens-mean"] == "2048"
    assert flags["--output-tokens-mean"] == "256"
    best = plan.best
    in_flight = best.requests_per_s * (best.ttft_s.value + best.tpot_s.value * 255)
    assert make_job(plan).concurrency == round(in_flight)
    assert make_job(plan_of("dense")).concurrency == 120
    trace = read_trace("azure-conversation-2023").workload()
    found = find_plan(model="Qwen/Qwen3-8B", hardware="h100-sxm", gpus=2, workload=trace)
    flags = dict(benchmark.aiperf_flags(make_job(found)))
    pairs = [p.split(":") for p in str(flags["--sequence-distribution"]).split(";")]
    assert len(pairs) == len(trace.isl)
    assert sum(float(p) for _, p in pairs) == pytest.approx(100, abs=1e-6)
    isl = sum(float(lengths.split(",")[0]) * float(p) / 100 for lengths, p in pairs)
    assert isl == pytest.approx(trace.mean_isl, rel=0.01)
    assert make_job(found).max_model_len >= max(trace.isl)


def test_the_comparison_reads_what_aiperf_writes(tmp_path: Path) -> None:
    export_plan(plan_of("dense split"), tmp_path / "out")
    predicted = json.loads((tmp_path / "out/benchmark/predicted.json").read_text())
    folder = tmp_path / "artifacts" / "run"
    folder.mkdir(parents=True)
    measured = {
        "time_to_first_token": {"unit": "ms", "avg": predicted["ttft_s"]["value"] * 1e3},
        "inter_token_latency": {"unit": "ms", "avg": predicted["tpot_s"]["value"] * 2e3},
        "output_token_throughput": {
            "unit": "tokens/sec",
            "avg": predicted["tokens_per_s_per_gpu"]["value"] * predicted["gpus"],
        },
    }
    script = [sys.executable, str(tmp_path / "out/benchmark/compare.py"), str(tmp_path / "artifacts")]
    assert subprocess.run(script, capture_output=True, check=False).returncode != 0
    (folder / "profile_export_aiperf.json").write_text(json.dumps(measured))
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert "TPOT" in done.stdout
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert [r["error"] for r in rows] == pytest.approx([0.0, -0.5, 0.0], abs=1e-9)
    assert [r["inside"] for r in rows] == [True, False, True]


def test_the_exported_plan_reads_back_as_the_deployment(tmp_path: Path) -> None:
    for case in CASES:
        data = json.loads(export_files(plan_of(case))["plan.json"])
        assert Deployment.from_json(data) == plan_of(case).recommended
