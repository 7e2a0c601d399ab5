from __future__ import annotations

import pytest
import torch
from small_models import KINDS, small_model

import tandem
from tandem.engine import host, host_rates


@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_this_machine_prices_models_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch, weights: torch.dtype) -> None:
    monkeypatch.setattr(host_rates, "_SHARE_S", 0.02)
    found = host.measure_host(weights)
    assert found.memory_bytes_per_s > 1e8
    assert found.peak("bf16") > 1e8
    p = host.host_precision(weights)
    precision = f"{p.weights}/{p.activations}/{p.kv}"
    for kind in KINDS:
        model = small_model(kind).spec
        short, long = (
            tandem.estimate(model=model, hardware=found, isl=isl, osl=8, concurrency=1, precision=precision, backend="tandem")
            for isl in (64, 256)
        )
        assert short.evidence == "roofline"
        assert 0 < short.ttft_s.value < long.ttft_s.value
        assert 0 < short.tpot_s.value <= long.tpot_s.value


def test_a_product_that_takes_twice_as_long_halves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(host_rates, "best_s", lambda run: next(seconds))
    fast, slow = host.measure_host(torch.float16), host.measure_host(torch.float16)
    assert fast.memory_bytes_per_s == 2 * slow.memory_bytes_per_s
    assert fast.peak("bf16") == pytest.approx(2 * slow.peak("bf16"))


def test_products_and_a_hand_off_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-off goes through the engine's own shared memory into another process."""
    monkeypatch.setattr(host_rates, "_PRODUCT_S", 0.001)
    found = host_rates.product_rates()
    assert {(one.weights, one.rows) for one in found} == {
        (w, n) for w in ("fp32", "fp16", "bf16", "int8") for n in (1, 16, 256)
    }
    assert all(one.flops_per_s > 1e7 for one in found)
    for kind in ("hybrid", "transformer"):
        assert 1e5 < host_rates.handoff_bytes_per_s(small_model(kind).spec) < 1e12
