"""In which number format a device computes, given the format of the weights; chosen from what its CPU or GPU can do."""

from __future__ import annotations

from functools import cache

import torch


@cache
def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); without it torch is ~200 times slower."""
    capability = torch.backends.cpu.get_cpu_capability()
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported and capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def compute_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of activations: that of the weights on a GPU and where a CPU has fast bf16, else fp32."""
    if device.type != "cpu" or (weights == torch.bfloat16 and cpu_has_fast_bf16()):
        return weights if weights.is_floating_point else torch.float32
    return torch.float32
