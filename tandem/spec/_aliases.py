"""Other names of catalogue entries. A table and no fuzzy matching: a name means one thing or is refused.

Where two organisations publish under one name, the name alone means the checkpoint listed first: that of the
model's maker.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Sibling(NamedTuple):
    """Another published checkpoint with the arithmetic of catalogue entry `of`, and what differs."""

    of: str
    native_precision: str | None = None
    max_context: int | None = None


# Other names of the very entry; the organisation may be left out of any that has one.
NICKNAMES: Final[dict[str, str]] = {
    "nemotron-nano-12b-v2": "nvidia/NVIDIA-Nemotron-Nano-12B-v2",
    "nano-12b-v2": "nvidia/NVIDIA-Nemotron-Nano-12B-v2",
    "nemotron-nano-9b-v2": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "nano-9b-v2": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "nemotron-h-8b": "nvidia/Nemotron-H-8B-Base-8K",
    "nemotron-h-56b": "nvidia/Nemotron-H-56B-Base-8K",
    "nemotron-3-nano-4b": "nvidia/NVIDIA-Nemotron-3-Nano-4B",
    "nemotron-3-nano-30b-a3b": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nemotron-3-nano": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nemotron-3-super": "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    "nemotron-3-ultra": "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B": "meta-llama/Meta-Llama-3.1-405B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "zhipuai/GLM-5": "zai-org/GLM-5",
    "zhipuai/GLM-5-FP8": "zai-org/GLM-5-FP8",
}

_12B = "nvidia/NVIDIA-Nemotron-Nano-12B-v2"
_9B = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
_NANO_30B = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
_SUPER = "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8"
_ULTRA = "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16"
_LLAMA_8B = "meta-llama/Meta-Llama-3.1-8B"
_LLAMA_70B = "meta-llama/Meta-Llama-3.1-70B"
_LLAMA_405B = "meta-llama/Meta-Llama-3.1-405B"
_QWEN_30B = "Qwen/Qwen3-30B-A3B"
_QWEN_235B = "Qwen/Qwen3-235B-A22B"
_R1 = "deepseek-ai/DeepSeek-R1"

SIBLINGS: Final[dict[str, Sibling]] = {
    "nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base": Sibling(_12B),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base": Sibling(_9B),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2-FP8": Sibling(_9B, "fp8"),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2-NVFP4": Sibling(_9B, "fp4"),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8": Sibling(_NANO_30B, "fp8"),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": Sibling(_NANO_30B, "fp4"),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": Sibling(_SUPER, "bf16"),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": Sibling(_SUPER, "fp4"),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8": Sibling(_ULTRA, "fp8"),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4": Sibling(_ULTRA, "fp4"),
    "meta-llama/Llama-3.1-8B-Instruct": Sibling(_LLAMA_8B),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": Sibling(_LLAMA_8B),
    "nvidia/Llama-3.1-8B-Instruct-FP8": Sibling(_LLAMA_8B, "fp8"),
    "nvidia/Llama-3.1-8B-Instruct-FP4": Sibling(_LLAMA_8B, "fp4"),
    "nvidia/Llama-3.1-8B-Instruct-NVFP4": Sibling(_LLAMA_8B, "fp4"),
    "meta-llama/Llama-3.1-70B-Instruct": Sibling(_LLAMA_70B),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": Sibling(_LLAMA_70B),
    "meta-llama/Llama-3.3-70B-Instruct": Sibling(_LLAMA_70B),
    "nvidia/Llama-3.1-70B-Instruct-FP8": Sibling(_LLAMA_70B, "fp8"),
    "nvidia/Llama-3.3-70B-Instruct-FP8": Sibling(_LLAMA_70B, "fp8"),
    "nvidia/Llama-3.3-70B-Instruct-FP4": Sibling(_LLAMA_70B, "fp4"),
    "nvidia/Llama-3.3-70B-Instruct-NVFP4": Sibling(_LLAMA_70B, "fp4"),
    "meta-llama/Llama-3.1-405B-Instruct": Sibling(_LLAMA_405B),
    "meta-llama/Meta-Llama-3.1-405B-Instruct": Sibling(_LLAMA_405B),
    "nvidia/Llama-3.1-405B-Instruct-FP8": Sibling(_LLAMA_405B, "fp8"),
    "nvidia/Llama-3.1-405B-Instruct-FP4": Sibling(_LLAMA_405B, "fp4"),
    "nvidia/Llama-3.1-405B-Instruct-NVFP4": Sibling(_LLAMA_405B, "fp4"),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Sibling("mistralai/Mixtral-8x7B-v0.1"),
    "Qwen/Qwen3-0.6B-FP8": Sibling("Qwen/Qwen3-0.6B", "fp8_block"),
    "Qwen/Qwen3-8B-FP8": Sibling("Qwen/Qwen3-8B", "fp8_block"),
    "nvidia/Qwen3-8B-FP8": Sibling("Qwen/Qwen3-8B", "fp8"),
    "nvidia/Qwen3-8B-NVFP4": Sibling("Qwen/Qwen3-8B", "fp4"),
    "Qwen/Qwen3-32B-FP8": Sibling("Qwen/Qwen3-32B", "fp8_block"),
    "nvidia/Qwen3-32B-FP8": Sibling("Qwen/Qwen3-32B", "fp8"),
    "nvidia/Qwen3-32B-NVFP4": Sibling("Qwen/Qwen3-32B", "fp4"),
    "Qwen/Qwen3-30B-A3B-FP8": Sibling(_QWEN_30B, "fp8_block"),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Sibling(_QWEN_30B, max_context=262_144),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": Sibling(_QWEN_30B, max_context=262_144),
    "nvidia/Qwen3-30B-A3B-FP8": Sibling(_QWEN_30B, "fp8"),
    "nvidia/Qwen3-30B-A3B-NVFP4": Sibling(_QWEN_30B, "fp4"),
    "Qwen/Qwen3-235B-A22B-FP8": Sibling(_QWEN_235B, "fp8_block"),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": Sibling(_QWEN_235B, max_context=262_144),
    "Qwen/Qwen3-235B-A22B-Thinking-2507": Sibling(_QWEN_235B, max_context=262_144),
    "nvidia/Qwen3-235B-A22B-FP8": Sibling(_QWEN_235B, "fp8"),
    "nvidia/Qwen3-235B-A22B-NVFP4": Sibling(_QWEN_235B, "fp4"),
    "nvidia/Qwen3.5-397B-A17B-NVFP4": Sibling("Qwen/Qwen3.5-397B-A17B", "fp4"),
    "deepseek-ai/DeepSeek-V3": Sibling(_R1),
    "deepseek-ai/DeepSeek-V3-0324": Sibling(_R1),
    "deepseek-ai/DeepSeek-V3.1": Sibling(_R1),
    "deepseek-ai/DeepSeek-R1-0528": Sibling(_R1),
    "nvidia/DeepSeek-R1-FP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-R1-NVFP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-R1-0528-FP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-R1-0528-NVFP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-V3-0324-NVFP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-V3.1-NVFP4": Sibling(_R1, "fp4"),
    "nvidia/DeepSeek-V3.2-NVFP4": Sibling("deepseek-ai/DeepSeek-V3.2", "fp4"),
    "nvidia/Kimi-K2.5-NVFP4": Sibling("moonshotai/Kimi-K2.5", "fp4"),
    "nvidia/GLM-5-NVFP4": Sibling("zai-org/GLM-5", "fp4"),
    "MiniMaxAI/MiniMax-M2.7": Sibling("MiniMaxAI/MiniMax-M2.5", max_context=204_800),
    "nvidia/MiniMax-M2.5-NVFP4": Sibling("MiniMaxAI/MiniMax-M2.5", "fp4"),
}

HARDWARE_NICKNAMES: Final[dict[str, str]] = {
    "a100": "a100-80gb-sxm",
    "a100-sxm": "a100-80gb-sxm",
    "b200": "b200-sxm",
    "b300": "b300-sxm",
    "gb200-nvl72": "gb200",
    "gb300-nvl72": "gb300",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
}
