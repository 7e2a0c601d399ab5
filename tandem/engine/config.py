"""How large an engine is: its batch, its step, and the memory of its cache, sized by the planner's own memory model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from tandem.perf.costs import Layout
from tandem.perf.memory import ModelMemory
from tandem.spec.design import Precision
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, ModelSpec
from tandem.spec.units import require_int

_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
DEFAULT_SHARE = 0.25
"""Of the machine's free memory, where nobody says how much the cache may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one engine.

    `step_tokens` is the most tokens that a step computes, decoded and prefilled together. Prompts are computed in passes that
    end at multiples of `pass_tokens`, whatever else runs, so that a request's numbers never depend on its neighbours.
    """

    max_batch: int = 32
    """Requests that hold state at once."""
    step_tokens: int = 512
    pass_tokens: int = 256
    block_size: int = 16
    """Tokens of a block of keys and values."""
    cache_bytes: int | None = None
    """Of blocks and slots together; None: a quarter of the free memory."""
    prefix_cache_bytes: int | None = None
    """Of prefixes kept for later requests, blocks and snapshots; None: half of cache_bytes, 0: no prefix cache."""
    max_context: int | None = None
    """Tokens of prompt and output; None: the model's."""
    threads: int | None = None
    """Of a decode step; None: torch's."""

    def __post_init__(self) -> None:
        require_int("max_batch", self.max_batch, high=1 << 16)
        require_int("block_size", self.block_size, high=1 << 12)
        require_int("pass_tokens", self.pass_tokens, high=1 << 16)
        require_int("step_tokens", self.step_tokens, high=1 << 24)
        if self.pass_tokens % self.block_size:
            raise SpecError(f"pass_tokens={self.pass_tokens}: must be a multiple of block_size={self.block_size}")
        if self.step_tokens < self.pass_tokens:
            raise SpecError(f"step_tokens={self.step_tokens}: must be at least pass_tokens={self.pass_tokens}")
        for name, low in (("cache_bytes", 1), ("prefix_cache_bytes", 0), ("max_context", 2), ("threads", 1)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), low=low, high=1 << 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """Blocks of keys and values and slots of recurrent state, with their bytes."""

    num_blocks: int
    num_slots: int
    block_bytes: int
    slot_bytes: int
    prefix_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all blocks and slots."""
        return self.num_blocks * self.block_bytes + self.num_slots * self.slot_bytes

    def max_tokens(self, config: EngineConfig) -> int:
        """Tokens that all blocks hold together; without attention nothing bounds them."""
        return self.num_blocks * config.block_size if self.block_bytes else 1 << 40


def size_cache(spec: ModelSpec, config: EngineConfig, kv_dtype: torch.dtype, *, free_bytes: int) -> CacheSize:
    """What fits: a slot for every request of the batch, the rest in blocks, no more than the batch can ever fill.

    Bytes are those of `tandem.perf.memory` (s0 + k * context), so that a plan's largest batch is the engine's. Raises
    SpecError where not one request of two blocks fits.
    """
    memory = ModelMemory(spec, Precision(kv=_FORMATS[kv_dtype]))
    window_bytes = torch.empty(0, dtype=kv_dtype).element_size()
    constant = _slot_bytes(memory, spec, window_bytes)
    per_token = float(memory.sequence_bytes(_ONE, 1.0) - memory.sequence_bytes(_ONE, 0.0))
    block_bytes = round(per_token * config.block_size)
    budget = config.cache_bytes if config.cache_bytes is not None else int(free_bytes * DEFAULT_SHARE)
    context = min(config.max_context or spec.max_context, spec.max_context)
    most = config.max_batch * -(-context // config.block_size)
    spare = budget - config.max_batch * constant
    blocks = most if block_bytes == 0 else min(most, spare // block_bytes)
    if blocks < 2 or spare < 0:
        least = config.max_batch * constant + 2 * block_bytes
        raise SpecError(
            f"cache_bytes={budget:,}: {config.max_batch} requests need {least:,} bytes at least; raise it, or lower max_batch"
        )
    prefix = config.prefix_cache_bytes
    return CacheSize(
        num_blocks=int(blocks),
        num_slots=config.max_batch,
        block_bytes=block_bytes,
        slot_bytes=constant,
        prefix_bytes=budget // 2 if prefix is None else prefix,
    )


def _slot_bytes(memory: ModelMemory, spec: ModelSpec, window_bytes: int) -> int:
    """Constant bytes of a sequence; the memory model counts windows in 16 bits, as GPUs keep them."""
    total = float(memory.sequence_bytes(_ONE, 0.0))
    for mixer in spec.layers:
        values = getattr(mixer, "state_values", None)
        if values is not None and not isinstance(mixer, Attention):
            total += values()[1] * (window_bytes - 2.0)
    return round(total)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that are free now, on a GPU or in this machine (its cgroup's limit included)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError, StopIteration):
        pass
    return free


def with_share(config: EngineConfig, device: torch.device, engines: int) -> EngineConfig:
    """The config with its cache fixed in bytes, where `engines` engines of one machine share what is free."""
    if config.cache_bytes is not None:
        return config
    return replace(config, cache_bytes=max(1, int(free_memory_bytes(device) * DEFAULT_SHARE / engines)))
