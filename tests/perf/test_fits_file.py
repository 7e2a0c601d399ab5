"""A fits file is checked once, when it is read: whatever is wrong with it is said in one line, and no look-up can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.perf.backend import PHYSICS, TERMS, ServingFits, parse_fits
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.errors import SpecError

ARCH = "0123abcd"
SETTING = f"vllm on h100-sxm with {ARCH} in fp8"
STOOD = {"num_rows": 9, "sequences_max": 64.0, "isl_max": 4096, "gpus_max": 8.0, "pp_max": 1.0, "drafts_max": 0.0}
Data = dict[str, Any]


def fits() -> Data:
    """The smallest file that says something of every kind of group."""
    by_term = {metric: dict.fromkeys(terms, 0.1) for metric, terms in TERMS.items()}
    by_factor = dict.fromkeys(TERMS, 0.1)
    pairs = {"calibrated vllm": [0.8, 1.2], "transferred vllm": [0.5, 2], "calibrated vllm dense": [1.1, 1.1]}
    widest = {"vllm": STOOD | by_term}
    shared = {f"vllm {rest}": {"num_rows": 9} | by_term for rest in ("on Hopper", "with dense", "in pools")}
    return {
        "models": {ARCH: "someone/something"},
        "common": by_term,
        "spread": {metric: dict(pairs) for metric in TERMS},
        "groups": widest | shared | {f"vllm with {ARCH}": {"num_rows": 9} | by_factor, SETTING: STOOD | by_factor},
    }


def put(*path: str, value: Any) -> Callable[[Data], None]:
    """Sets an entry; Ellipsis takes it away."""

    def change(data: Data) -> None:
        *above, last = path
        for key in above:
            data[key] = data[key] = dict(data[key])
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


BAD: list[tuple[Callable[[Data], None], str]] = [
    (put("common", value=...), "common='None': must be a mapping"),
    (put("common", value={}), "common='{}': must be a mapping of names, and hold some"),
    (put("common", "ttft", value=...), "common.ttft='None': must be a mapping"),
    (put("common", "tpot", value={}), "common.tpot='{}': must be a mapping"),
    (put("common", "tpot", value=[0.1]), "common.tpot='[0.1]': must be a mapping"),
    (put("common", "tpot", "step_s", value=float("nan")), "common.tpot.step_s='nan': must be a number from -10 to 10"),
    (put("common", "tpot", "step_s", value=900), "common.tpot.step_s='900': must be a number"),
    (put("common", "tpot", "step_s", value="fast"), "common.tpot.step_s='fast': must be a number"),
    (put("common", "tpot", "steps", value=0.1), "common.tpot.steps: no term of tpot; they are step_s"),
    (put("spread", value=...), "spread='None': must be a mapping"),
    (put("spread", value=[]), "spread='[]': must be a mapping"),
    (put("spread", "tpot", value={}), "spread.tpot='{}': must be a mapping"),
    (put("spread", "tpot", "calibrated vllm", value=...), "spread.tpot: has no 'calibrated vllm'"),
    (put("spread", "ttft", "transferred vllm", value=...), "spread.ttft: has no 'transferred vllm'"),
    (put("spread", "tpot", "calibrated vllm", value=[1.0]), "spread.tpot.calibrated vllm='[1.0]': must be two numbers"),
    (put("spread", "tpot", "calibrated vllm", value=1.0), "spread.tpot.calibrated vllm='1.0': must be two numbers"),
    (put("spread", "tpot", "calibrated vllm", value=[2.0, 1.0]), "the first must not be above the second"),
    (put("spread", "tpot", "calibrated vllm", value=[0.0, 1.0]), "spread.tpot.calibrated vllm='0.0': must be a number"),
    (put("spread", "tpot", "calibrated vllm", value=[0.5, float("inf")]), "spread.tpot.calibrated vllm='inf': must be"),
    (put("spread", "tpot", "calibrated vllm", value=[0.5, "wide"]), "spread.tpot.calibrated vllm='wide': must be a number"),
    (put("groups", value=...), "groups='None': must be a mapping"),
    (put("groups", value={}), "groups='{}': must be a mapping of names, and hold some"),
    (put("groups", value=3), "groups='3': must be a mapping"),
    (put("groups", value={3: {}}), "groups='{3: {}}': must be a mapping of names"),
    (put("groups", "vllm", value=...), "groups: has no 'vllm', which others deviate from"),
    (put("groups", "vllm", value=7), "groups.vllm='7': must be a mapping"),
    (put("groups", "vllm", "tpot", value=0.1), "groups.vllm.tpot='0.1': must be a mapping"),
    (put("groups", "vllm", "tpot", value=...), "groups.vllm.tpot='None': must be a mapping"),
    (put("groups", "vllm", "tpot", "gemm", value=-11), "groups.vllm.tpot.gemm='-11': must be a number from -10 to 10"),
    (put("groups", "vllm", "tpot", "gemm", value=10**400), "groups.vllm.tpot.gemm='1000"),
    (put("groups", "vllm", "isl_max", value=...), "groups.vllm.isl_max='None': must be a number"),
    (put("groups", "vllm", "num_rows", value="many"), "groups.vllm.num_rows='many': must be a number"),
    (put("groups", "vllm in pools", "ttft", "queues", value=0.1), "groups.vllm in pools.ttft.queues: no term of ttft"),
    (put("groups", f"vllm with {ARCH}", "tpot", value={"gemm": 0.1}), f"groups.vllm with {ARCH}.tpot="),
    (put("groups", SETTING, "tpot", value=[0.1]), f"groups.{SETTING}.tpot='[0.1]': must be a number"),
    (put("groups", SETTING, "ttft", value=True), f"groups.{SETTING}.ttft='True': must be a number"),
    (put("groups", SETTING, "sequences_max", value=float("nan")), f"groups.{SETTING}.sequences_max='nan': must be a number"),
    (put("groups", SETTING, "num_rows", value=...), f"groups.{SETTING}.num_rows='None': must be a number"),
    (put("groups", "vlm", value={"num_rows": 1}), "groups.vlm: no name of a group; it starts with one of vllm, sglang"),
    (put("models", value=3), "models='3': must be a mapping"),
]  # fmt: skip


def test_a_whole_file_is_read_and_its_settings_are_found() -> None:
    found = parse_fits(yaml.safe_dump(fits()))
    fit, evidence = found.find("vllm", load_hardware("h100-sxm"), load_spec("qwen3-8b"), "fp8")
    assert evidence == "transferred"
    assert (fit.tpot_p10, fit.tpot_p90, fit.num_rows) == (0.5, 2.0, 9)
    assert fit.gemm > PHYSICS.gemm


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_what_a_look_up_could_stumble_over_is_refused_in_one_line(tmp_path: Path, change: Any, said: str) -> None:
    data = fits()
    change(data)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError) as refused:
        ServingFits.read(file)
    line = str(refused.value)
    assert line.startswith(f"fits={str(file)!r}: serving fits: not what `tandem calibrate serving --out` writes (")
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", "just words", "- 1", "a: [1", "a: 2024-99-99", "? [1]\n: 2", "[" * 5000])
def test_text_that_is_no_mapping_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpecError, match=r"^serving fits: not what .*\)$") as refused:
        parse_fits(text)
    assert "\n" not in str(refused.value)
