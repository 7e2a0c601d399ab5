"""Every flag, key and value of an export exists in the release that it is written for.

The lists under `data/serving_flags` were read out of the published wheels by `tools/read_serving_flags.py`; nothing here was
typed by hand. llm-d and Kubernetes publish no package: test_export_files checks their objects against one another only.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_cases import CASES, plan_of

from tandem.plan.export import dynamo, ray, releases, sglang, vllm
from tandem.plan.export.folder import export_files
from tandem.plan.export.formats import STATE_DTYPES
from tandem.plan.export.manifests import TOKEN_SECRET
from tandem.spec.catalog import hardware_names

DATA = Path(__file__).parent / "data" / "serving_flags"
every_case = pytest.mark.parametrize("case", CASES)
LAUNCHED = {
    # file, program in it, package that defines its options
    "vllm serve": ("vllm/run-node.sh", "vllm", releases.VLLM),
    "vllm-router": ("vllm/router.sh", "vllm-router", releases.VLLM_ROUTER),
    "python3 -m sglang.launch_server": ("sglang/run-node.sh", "sglang", releases.SGLANG),
    "python3 -m sglang_router.launch_router": ("sglang/router.sh", "sglang-router", releases.SGLANG_ROUTER),
    "aiperf profile": ("benchmark/run.sh", "aiperf", releases.AIPERF),
    "guidellm run": ("benchmark/guidellm.sh", "guidellm", releases.GUIDELLM),
}
CHOICES = {
    "--kv-cache-dtype": "kv_cache_dtype",
    "--quantization": "quantization",
    "--mamba-ssm-cache-dtype": "mamba_ssm_cache_dtype",
    "--mamba-ssm-dtype": "mamba_ssm_dtype",
    "--policy": "policy",
    "--disaggregation-mode": "disaggregation_mode",
    "--disaggregation-transfer-backend": "disaggregation_transfer_backend",
    "--endpoint-type": "endpoint_type",
}


@cache
def published(package: str, version: str) -> dict[str, Any]:
    """What a release defines."""
    data = json.loads((DATA / f"{package}-{version}.json").read_text())
    assert (data["package"], data["version"]) == (package, version)
    return data


def flags_of(script: str, program: str) -> list[tuple[str, str]]:
    """Each flag of each call of a program with the word behind it."""
    joined = re.sub(r"\\\n\s*", " ", script)
    lines = [
        line.partition(program + " ")[2] for line in joined.splitlines() if program + " " in line and line.lstrip()[0] != "#"
    ]
    found = []
    for line in lines:
        words = shlex.split(line)
        found += [(w, n) for w, n in zip(words, [*words[1:], ""], strict=True) if w.startswith("--")]
    return found


def unknown(flags: list[tuple[str, str]], release: dict[str, Any], known: set[str] | None = None) -> list[str]:
    """Flags that a release lacks, and values that it does not take."""
    names = set(release["flags"]) if known is None else known
    wrong = [name for name, _ in flags if name not in names]
    for name, value in flags:
        key = CHOICES.get(name)
        if value.startswith("kind="):
            pairs = dict(p.split("=", 1) for p in value.split(","))
            wrong += [f"{name} {field}" for field in pairs if field not in release["kinds"].get(pairs["kind"], ())]
        if key in release and value not in release[key]:
            wrong.append(f"{name} {value}")
    return wrong


def unknown_transfer(text: str, release: dict[str, Any]) -> list[str]:
    """Keys, connector and role of a transfer configuration that a release lacks."""
    given = json.loads(text)
    wrong = [key for key in given if key not in release["kv_transfer_config"]]
    wrong += [given["kv_connector"]] if given["kv_connector"] not in release["kv_connector"] else []
    return wrong + ([given["kv_role"]] if given["kv_role"] not in release["kv_role"] else [])


@pytest.mark.parametrize("program", LAUNCHED)
@every_case
def test_every_flag_of_every_script_is_defined_by_its_package(case: str, program: str) -> None:
    file, package, version = LAUNCHED[program]
    script = export_files(plan_of(case))[file]
    flags = flags_of(script, program)
    assert flags
    assert unknown(flags, published(package, version)) == []
    assert f"{package}=={version}" in script
    for name, value in flags:
        if name == "--kv-transfer-config":
            assert unknown_transfer(value, published("vllm", version)) == []


@every_case
def test_environment_variables_are_vllms_own(case: str) -> None:
    files = export_files(plan_of(case))
    for path, version in (
        ("vllm/run-node.sh", releases.VLLM),
        ("llm-d/model-servers.yaml", releases.VLLM),
        ("dynamo/graph.yaml", releases.INSIDE_DYNAMO["vllm"]),
        ("ray/serve.yaml", releases.INSIDE_RAY["vllm"]),
    ):
        assert set(re.findall(r"\bVLLM_[A-Z_]+\b", files[path])) <= set(published("vllm", version)["environment"])


@every_case
def test_the_graph_deployment_follows_dynamos_schema_and_its_engines_options(case: str) -> None:
    release = published("ai-dynamo", releases.DYNAMO)
    assert release["pins"] == releases.INSIDE_DYNAMO
    graph = yaml.safe_load(export_files(plan_of(case))["dynamo/graph.yaml"])
    schema = {k: set(v) for k, v in release["schema"].items()}
    assert graph["apiVersion"] in release["api"]
    assert set(graph) <= schema["Config"]
    assert set(graph["metadata"]) <= schema["Metadata"]
    assert set(graph["spec"]) <= schema["Spec"]
    inside = "sglang" if plan_of(case).recommended.backend == "sglang" else "vllm"
    engine = published(inside, releases.INSIDE_DYNAMO[inside])
    for component in graph["spec"]["components"]:
        assert set(component) <= schema["Component"]
        assert component["type"] in release["component_types"]
        assert set(component.get("multinode", {})) <= schema["MultinodeConfig"]
        assert set(component["podTemplate"]) <= schema["PodTemplate"]
        assert set(component["podTemplate"]["spec"]) <= schema["PodSpec"]
        for container in component["podTemplate"]["spec"]["containers"]:
            assert set(container) - {"envFrom"} <= schema["Container"]  # Kubernetes' own, and in every shipped template
            assert container["envFrom"] == [{"secretRef": {"name": TOKEN_SECRET}}]
            assert container["image"] in release["images"]
            words = [str(w) for w in container["args"]]
            flags = [(w, n) for w, n in zip(words, [*words[1:], ""], strict=True) if w.startswith("--")]
            if component["type"] == "frontend":
                assert unknown(flags, {}, set(release["frontend"])) == []
                continue
            assert container["command"] == ["python3", "-m", f"dynamo.{inside}"]
            assert unknown(flags, engine, set(release[inside]) | set(engine["flags"])) == []
            for name, value in flags:
                if name == "--kv-transfer-config":
                    assert unknown_transfer(value, engine) == []


@every_case
def test_the_application_has_rays_fields_and_its_engines_arguments(case: str) -> None:
    release = published("ray", releases.RAY)
    assert release["pins"] == releases.INSIDE_RAY
    data = yaml.safe_load(export_files(plan_of(case))["ray/serve.yaml"])
    assert set(data) <= set(release["ServeDeploySchema"])
    assert set(data["http_options"]) <= set(release["HTTPOptionsSchema"])
    engine = published("vllm", releases.INSIDE_RAY["vllm"])
    for app in data["applications"]:
        assert set(app) <= set(release["ServeApplicationSchema"])
        module, _, builder = app["import_path"].partition(":")
        assert module == "ray.serve.llm"
        assert builder in release["builders"]
        assert set(app["args"]) <= set(release[builder])
        for config in [c for value in app["args"].values() for c in (value if isinstance(value, list) else [value])]:
            assert set(config) <= set(release["LLMConfig"])
            assert set(config["model_loading_config"]) <= set(release["ModelLoadingConfig"])
            assert set(config["deployment_config"]) <= set(release["DeploymentSchema"])
            assert config["accelerator_type"] in release["accelerators"]
            kwargs = config["engine_kwargs"]
            assert set(kwargs) <= set(engine["engine_fields"])
            assert kwargs.get("kv_cache_dtype", "auto") in engine["kv_cache_dtype"]
            assert kwargs.get("quantization", "fp8") in engine["quantization"]
            if "kv_transfer_config" in kwargs:
                assert unknown_transfer(json.dumps(kwargs["kv_transfer_config"]), engine) == []


@every_case
def test_llm_ds_servers_take_vllms_flags(case: str) -> None:
    release = published("vllm", releases.VLLM)
    for d in yaml.safe_load_all(export_files(plan_of(case))["llm-d/model-servers.yaml"]):
        group = d["spec"].get("leaderWorkerTemplate")
        templates = [group["leaderTemplate"], group["workerTemplate"]] if group else [d["spec"]["template"]]
        for t in templates:
            container = t["spec"]["containers"][0]
            assert container["image"].endswith(f":v{releases.VLLM}")
            words = [w.partition("=")[0] if w.startswith("--") else w for w in container["args"]]
            flags = [(w, n) for w, n in zip(words, [*words[1:], ""], strict=True) if w.startswith("--")]
            assert unknown(flags, release) == []


def test_formats_that_the_planner_knows_become_values_that_every_release_takes() -> None:
    for package, module, state in (("vllm", vllm, "mamba_ssm_cache_dtype"), ("sglang", sglang, "mamba_ssm_dtype")):
        versions = [releases.VLLM if package == "vllm" else releases.SGLANG, releases.INSIDE_DYNAMO[package]]
        for version in versions + ([releases.INSIDE_RAY["vllm"]] if package == "vllm" else []):
            release = published(package, version)
            assert {*module.FORMATS.kv.values(), "bfloat16"} <= set(release["kv_cache_dtype"])
            assert set(module.FORMATS.online.values()) <= set(release["quantization"])
            assert set(STATE_DTYPES.values()) <= set(release[state])


def test_ray_knows_the_gpus_by_the_names_given_to_it() -> None:
    assert set(ray.ACCELERATORS) <= set(hardware_names())
    assert set(ray.ACCELERATORS.values()) <= set(published("ray", releases.RAY)["accelerators"])


def test_attention_data_parallelism_is_spelled_as_each_release_of_sglang_does() -> None:
    new, old = published("sglang", releases.SGLANG), published("sglang", releases.INSIDE_DYNAMO["sglang"])
    assert sglang.ATTENTION_DP in new["flags"]
    assert sglang.ATTENTION_DP not in old["flags"]
    assert "--enable-dp-attention" in old["flags"]
    assert "--enable-dp-attention" not in new["flags"]  # deprecated there, and such flags are left out of the lists


def test_the_comparison_names_metrics_that_aiperf_exports() -> None:
    release = published("aiperf", releases.AIPERF)
    text = export_files(plan_of("dense"))["benchmark/compare.py"]
    metrics = re.findall(r'^    \("[^"]+", "(\w+)"', text, re.M)
    assert len(metrics) == 3
    assert set(metrics) <= set(release["metrics"])
    assert re.findall(r'EXPORT = "(.+)"', text) == release["export"]


@pytest.mark.parametrize("program", LAUNCHED)
def test_a_renamed_flag_is_noticed(program: str) -> None:
    file, package, version = LAUNCHED[program]
    release = published(package, version)
    flags = flags_of(export_files(plan_of("experts split"))[file], program)
    for name in {n for n, _ in flags}:
        renamed = {**release, "flags": [f"{f}-renamed" if f == name else f for f in release["flags"]]}
        assert name in unknown(flags, renamed), name
    for kind, fields in release.get("kinds", {}).items():
        if any(value.startswith(f"kind={kind},") for _, value in flags):
            assert unknown(flags, {**release, "kinds": {**release["kinds"], kind: fields[:1]}}) != [], kind
    for name, key in CHOICES.items():
        used = {v for n, v in flags if n == name}
        if used and key in release:
            narrowed = {**release, key: [v for v in release[key] if v not in used]}
            assert unknown(flags, narrowed) != []


def test_a_renamed_key_of_graph_or_application_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dynamo.graph

    def renamed(job: Any) -> dict[str, Any]:
        graph = whole(job)
        graph["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]["arguments"] = []
        return graph

    monkeypatch.setattr(dynamo, "graph", renamed)
    with pytest.raises(AssertionError):
        test_the_graph_deployment_follows_dynamos_schema_and_its_engines_options("dense")
