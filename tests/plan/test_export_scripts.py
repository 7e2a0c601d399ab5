"""Exported scripts, run with stand-ins for the programs they start."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import yaml
from export_cases import plan_of

from tandem.plan.export.folder import export_plan

STUB = """#!/usr/bin/env bash
trap 'kill $!; echo ended >> "$STARTED.ended"; exit 0' TERM
sleep 60 &
echo "$CUDA_VISIBLE_DEVICES|$VLLM_NIXL_SIDE_CHANNEL_HOST:$VLLM_NIXL_SIDE_CHANNEL_PORT|$*" >> "$STARTED"
wait $!
"""


def lines_of(file: Path, count: int) -> list[str]:
    """Lines of a file once it has so many, or after 20 s."""
    deadline = time.monotonic() + 20
    while (not file.exists() or file.read_text().count("\n") < count) and time.monotonic() < deadline:
        time.sleep(0.02)
    return file.read_text().splitlines()


def test_a_hosts_script_starts_its_instances_with_gpus_and_ports_of_their_own_and_ends_them(tmp_path: Path) -> None:
    export_plan(plan_of("dense split"), tmp_path / "out")
    stub, started = tmp_path / "bin" / "vllm", tmp_path / "started"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "STARTED": str(started), "MODEL": "a folder"}
    (tmp_path / "out/nodes.env").write_text('NODES=(10.0.0.1 10.0.0.2)\nMODEL="$MODEL"\n')
    node = ["bash", str(tmp_path / "out/vllm/run-node.sh")]
    script = subprocess.Popen([*node, "0"], env=environment)
    lines = [line.split("|") for line in lines_of(started, 7)]
    script.terminate()
    assert script.wait(timeout=20) != 0
    assert lines_of(tmp_path / "started.ended", 7) == ["ended"] * 7
    assert sorted(gpus for gpus, _, _ in lines) == ["0", "1", "2", "3", "4", "5", "6,7"]  # 6 x tp1, then tp2
    assert {side.partition(":")[0] for _, side, _ in lines} == {"10.0.0.1"}
    assert len({side for _, side, _ in lines}) == 7
    assert len({re.search(r"--port (\d+)", words)[1] for _, _, words in lines}) == 7  # type: ignore[index]
    assert all(words.startswith("serve a folder --served-model-name Qwen/Qwen3-8B ") for _, _, words in lines)
    done = subprocess.run([*node, "9"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "host 9 has no address in nodes.env" in done.stderr


def test_a_name_cannot_run_anything(tmp_path: Path) -> None:
    plan = plan_of("dense split")
    name = "evil/$((`touch pwned`))${x:-$(touch pwned)}'; touch pwned; \"$MODEL"
    export_plan(replace(plan, model=plan.model.renamed(name)), tmp_path / "out")
    (tmp_path / "bin").mkdir()
    for program in ("vllm", "vllm-router", "python3", "aiperf", "guidellm"):
        stub = tmp_path / "bin" / program
        stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> "$SEEN"\n')
        stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for script in ("vllm/run-node.sh", "vllm/router.sh", "sglang/run-node.sh", "benchmark/run.sh", "benchmark/guidellm.sh"):
        seen = tmp_path / "seen"
        words = ["bash", str(tmp_path / "out" / script), "0"]
        subprocess.run(words, env={**environment, "SEEN": str(seen)}, capture_output=True, check=True, cwd=tmp_path)
        if "router" not in script:
            assert any(line.endswith(name) for line in seen.read_text().splitlines())
        seen.unlink()
    assert not list(tmp_path.rglob("pwned"))
    config = yaml.safe_load((tmp_path / "out/ray/serve.yaml").read_text())["applications"][0]["args"]["decode_config"]
    assert config["model_loading_config"]["model_id"] == name
