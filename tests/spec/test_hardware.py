from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.spec.catalog import hardware_names, load_hardware
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec, read_hardware

NUMBERS = {
    "memory_bytes",
    "memory_bytes_per_s",
    "usable_memory_fraction",
    "peak_flops",
    "scale_up_gpus",
    "scale_up_bytes_per_s",
    "scale_out_bytes_per_s",
    "price_per_hour_usd",
}
MEASURED = {
    "a100-80gb-sxm",
    "b200-sxm",
    "b300-sxm",
    "gb200",
    "gb300",
    "h100-sxm",
    "h200-sxm",
    "l40s",
    "rtx-pro-6000",
}


def example(**changes: Any) -> dict[str, Any]:
    return {**load_hardware("h100-sxm").to_json(), **changes}


@pytest.mark.parametrize("name", hardware_names())
def test_every_number_of_the_catalogue_has_a_source(name: str) -> None:
    gpu = load_hardware(name)
    assert gpu.name == name
    calibrated = {"bandwidth_efficiency"} if gpu.bandwidth_efficiency is not None else set()
    assert set(gpu.sources) == NUMBERS | calibrated
    assert all(len(source) > 10 for source in gpu.sources.values())


@pytest.mark.parametrize("name", hardware_names())
def test_the_catalogue_is_plausible(name: str) -> None:
    gpu = load_hardware(name)
    assert gpu.fits_from in MEASURED
    assert (gpu.fits_from == name) == (name in MEASURED)
    assert 20 * 2**30 < gpu.memory_bytes < 300 * 2**30
    assert 2e11 < gpu.memory_bytes_per_s <= 8e12
    assert gpu.peak("bf16") <= gpu.peak("fp8") <= gpu.peak("fp4")
    assert gpu.scale_up_bytes_per_s <= gpu.memory_bytes_per_s
    assert gpu.scale_up_gpus in (8, 72)


def test_a10g_is_that_of_paper_a() -> None:
    gpu = load_hardware("a10g")
    assert gpu.usable_memory_bytes / 2**30 - 1.3 == pytest.approx(19.66, abs=0.005)
    assert gpu.peak_flops["bf16"] == 70e12
    assert gpu.memory_bytes_per_s == 600e9


@pytest.mark.parametrize("name", hardware_names())
def test_round_trip(name: str) -> None:
    gpu = load_hardware(name)
    again = read_hardware(json.loads(json.dumps(gpu.to_json())))
    assert again == gpu
    assert hash(again) == hash(gpu)


def test_a_format_that_is_lacking_runs_at_the_next_wider_peak() -> None:
    ampere, hopper, blackwell = (load_hardware(n) for n in ("a100", "h100", "b200"))
    assert ampere.peak("fp8") == ampere.peak("int4") == ampere.peak("fp16") == ampere.peak("bf16") == 312e12
    assert hopper.peak("fp4") == hopper.peak("mxfp4") == hopper.peak("fp8_block") == hopper.peak("fp8") == 1978e12
    assert blackwell.peak("fp4") == 9000e12
    with pytest.raises(SpecError, match="dtype='fp32'"):
        hopper.peak("fp32")


@given(st.integers(1, 1000))
def test_a_group_that_outgrows_its_domain_uses_the_network(gpus: int) -> None:
    gpu = load_hardware("gb200")
    assert gpu.link_bytes_per_s(gpus) == (900e9 if gpus <= 72 else 100e9)


@pytest.mark.parametrize("gpus", [0, -1, 1.5])
def test_a_group_has_at_least_one_gpu(gpus: Any) -> None:
    with pytest.raises(SpecError, match="gpus"):
        load_hardware("h100").link_bytes_per_s(gpus)


@pytest.mark.parametrize("field", [f.name for f in fields(HardwareSpec) if f.name != "bandwidth_efficiency"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(SpecError, match=rf"^{field}: missing"):
        read_hardware({k: v for k, v in example().items() if k != field})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gb": 80}, "memory_gb: unknown hardware field"),
        ({"name": ""}, "name=''"),
        ({"vendor": 7}, "vendor=7"),
        ({"memory_bytes": 8.5e10}, "memory_bytes="),
        ({"memory_bytes": -1}, "memory_bytes=-1"),
        ({"memory_bytes_per_s": 0}, "memory_bytes_per_s=0"),
        ({"memory_bytes_per_s": "fast"}, "memory_bytes_per_s='fast'"),
        ({"memory_bytes_per_s": float("nan")}, "memory_bytes_per_s=nan"),
        ({"usable_memory_fraction": 1.1}, "usable_memory_fraction=1.1"),
        ({"bandwidth_efficiency": 2}, "bandwidth_efficiency=2"),
        ({"bandwidth_efficiency": 0.7}, "sources.bandwidth_efficiency: missing"),
        ({"scale_up_gpus": True}, "scale_up_gpus=True"),
        ({"peak_flops": {"fp8": 1e15}}, "peak_flops="),
        ({"peak_flops": 1e15}, "peak_flops="),
        ({"peak_flops": {"bf16": 1e15, "fp6": 1e15}}, "peak_flops.fp6: unknown"),
        ({"peak_flops": {"bf16": None}}, "peak_flops.bf16=None"),
        ({"sources": None}, "sources.memory_bytes: missing"),
        ({"sources": {**load_hardware("h100").sources, "colour": "a brochure"}}, "sources.colour: unknown"),
    ],
)
def test_a_bad_field_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_hardware(example(**change))


def test_a_specification_is_a_mapping() -> None:
    with pytest.raises(SpecError, match="must be a mapping"):
        read_hardware([])  # type: ignore[arg-type]


def test_numbers_may_be_written_with_an_exponent_alone() -> None:
    gpu = read_hardware(example(memory_bytes_per_s="3e12", peak_flops={"bf16": "1e15"}))
    assert gpu.memory_bytes_per_s == 3e12
    assert gpu.peak("fp8") == 1e15
