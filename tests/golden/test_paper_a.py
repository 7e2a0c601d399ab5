"""Paper A's published speed and size numbers, with source and tolerance (facts/paper-a.md sections 0.2, 4.3, 4.6, 5).

One constant is calibrated: bandwidth_efficiency of a10g.yaml, on the 156.42 tok/s of Table 10. Every ratio, every batch
size and all H100 rows are pure prediction.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import pytest

from tandem.perf.costs import Layout
from tandem.perf.estimate import EstimateResult, estimate
from tandem.perf.memory import ModelMemory, total_weight_bytes
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.hardware import HardwareSpec
from tandem.spec.huggingface import read_config
from tandem.spec.model import Attention, Mamba2, ModelSpec
from tandem.spec.units import GIB

NANO_12B = "nvidia/NVIDIA-Nemotron-Nano-12B-v2"
NANO_9B = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
QWEN = "Qwen/Qwen3-8B"
PATTERN_7B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-MMMM-M-"


def nano_7b() -> ModelSpec:
    """ModelOpt's auto-pruned 9B: 48 layers, hidden 4352, FFN 13824, 120 Mamba heads."""
    file = resources.files("tandem.spec") / "data" / "models" / "nvidia--NVIDIA-Nemotron-Nano-9B-v2_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    changed = {
        "hybrid_override_pattern": PATTERN_7B,
        "num_hidden_layers": len(PATTERN_7B),
        "hidden_size": 4352,
        "intermediate_size": 13_824,
        "mamba_num_heads": 120,
    }
    return read_config({**config, **changed}, name="Nano-7B")


def at_largest_batch(
    model: str | ModelSpec, hardware: str | HardwareSpec, isl: int, osl: int, precision: str = "bf16"
) -> EstimateResult:
    traffic = {"model": model, "hardware": hardware, "isl": isl, "osl": osl, "precision": precision}
    return estimate(**traffic, batch=estimate(**traffic, batch=1).max_batch)


def test_a10g_8k_16k() -> None:
    """Table 10, candidate 2: 156.42 tok/s at batch 8; Figure 1: 6.3 times Qwen3-8B, of which one sequence fits."""
    nano, qwen = (at_largest_batch(m, "a10g", 8192, 16_384) for m in (NANO_9B, QWEN))
    assert (nano.max_batch, qwen.max_batch) == (8, 1)
    assert nano.tokens_per_s_per_gpu.value == pytest.approx(156.42, rel=0.10)
    ratio = nano.tokens_per_s_per_gpu.value / qwen.tokens_per_s_per_gpu.value
    assert ratio == pytest.approx(6.3, rel=0.10)


def test_a10g_1k_8k() -> None:
    """Figure 1: about 3.3 times Qwen3-8B."""
    nano, qwen = (at_largest_batch(m, "a10g", 1024, 8192) for m in (NANO_9B, QWEN))
    assert nano.tokens_per_s_per_gpu.value / qwen.tokens_per_s_per_gpu.value == pytest.approx(3.3, rel=0.15)


def test_the_ratio_is_not_what_was_fitted() -> None:
    """The calibrated constant moves both models alike: from 0.6 to 0.8 their ratio hardly moves, the speeds do."""
    gpu, ratios, speeds = load_hardware("a10g"), [], []
    for efficiency in (0.6, 0.65, 0.7, 0.75, 0.8):
        changed = replace(gpu, bandwidth_efficiency=efficiency)
        nano, qwen = (at_largest_batch(m, changed, 8192, 16_384).tokens_per_s_per_gpu.value for m in (NANO_9B, QWEN))
        ratios.append(nano / qwen)
        speeds.append(nano)
    assert max(ratios) / min(ratios) < 1.02
    assert max(speeds) / min(speeds) > 1.2


@pytest.mark.parametrize(("model", "tokens_per_s"), [(NANO_12B, 585), (NANO_9B, 794), ("7b", 963)])
def test_h100_32k_1k(model: str, tokens_per_s: float) -> None:
    """Section 4.6: vLLM, one H100, ISL 32768 / OSL 1024, bf16 weights, fp8 cache, fp32 state; the batch fills the memory."""
    spec = nano_7b() if model == "7b" else load_spec(model)
    found = at_largest_batch(spec, "h100-sxm", 32_768, 1024, "bf16/bf16/fp8")
    assert found.tokens_per_s_per_gpu.value == pytest.approx(tokens_per_s, rel=0.10)


@pytest.mark.parametrize(("model", "gib"), [(NANO_12B, 22.9), (NANO_9B, 16.6), ("7b", 13.1)])
def test_load_memory(model: str, gib: float) -> None:
    """Section 4.6: what vLLM reports after loading the bf16 weights."""
    spec = nano_7b() if model == "7b" else load_spec(model)
    assert total_weight_bytes(spec, Precision()) / GIB == pytest.approx(gib, abs=0.1)


def test_the_7b_is_the_published_one() -> None:
    """Section 1.1: 6.998B parameters in 24 Mamba, 20 feed-forward and 4 attention layers."""
    spec = nano_7b()
    counts = {kind: sum(isinstance(m, kind) for m in spec.layers) for kind in (Mamba2, Attention)}
    assert (counts[Mamba2], counts[Attention], len(spec.layers)) == (24, 4, 48)
    assert spec.parameters == pytest.approx(6.998e9, rel=1e-4)


def test_state_transfer_of_a_hybrid_and_of_a_transformer() -> None:
    """facts/paper-b.md section 1.10: s0 + k * ISL with k 16,384 B and s0 about 141.6 MB plus 2 MB, against 147,456 B and 0."""
    one, lengths = Layout(1.0, 1.0, 1.0, 1.0, 1.0), (1024, 8192)
    nano, qwen = (ModelMemory(load_spec(m), Precision()) for m in (NANO_9B, QWEN))
    s0, k = float(nano.sequence_bytes(one, 0.0)), nano.model.kv_bytes_per_token()
    assert nano.model.ssm_bytes() == pytest.approx(141.6e6, rel=0.001)
    assert s0 == pytest.approx(141.6e6 + 2e6, rel=0.001)
    assert (k, qwen.model.kv_bytes_per_token()) == (16_384, 147_456)
    moved = [[float(m.sequence_bytes(one, float(isl))) for isl in lengths] for m in (nano, qwen)]
    assert moved[0] == [s0 + k * isl for isl in lengths]
    assert moved[1] == [147_456 * isl for isl in lengths]
    assert moved[0] == pytest.approx([160e6, 278e6], rel=0.005)
    assert moved[1] == pytest.approx([151e6, 1.21e9], rel=0.005)
    assert moved[1][1] / moved[0][1] == pytest.approx(4.3, abs=0.1)
