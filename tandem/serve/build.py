"""Workers that serve a model: what a place of any kind needs to build one, and how states find their way between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.handoff import StateSink
from tandem.engine.transfer import OpenedState, StateLayout, StateTransport
from tandem.engine.types import EngineRequest
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.serve.messages import Capacity
from tandem.serve.worker import StateLink, Worker
from tandem.spec.errors import Infeasible

WARM_BYTES = 64 << 20
"""Shared memory whose pages a worker takes when it starts: fresh ones would make its first hand-off slow."""
_PREFIX = "tandem"
Transport = Literal["shared-memory", "ray", "ray-tensors"]


class ModelStates:
    """A worker's `StateLink`: states of one model over any transport."""

    def __init__(self, transport: StateTransport, decoder: Decoder) -> None:
        self._transport, self._spec, self._dtype = transport, decoder.spec, decoder.state_dtype
        self._device = decoder.device

    def sink(self, request: EngineRequest) -> StateSink | Infeasible:
        """Takes the state of one request: of its prompt and of all tokens it has had but the newest."""
        tokens = len(request.prompt_ids) + max(0, len(request.output_ids) - 1)
        return self._transport.sink(StateLayout(spec=self._spec, tokens=tokens, dtype=self._dtype))

    def open(self, receipt: Any) -> OpenedState:
        """The state behind a receipt, on the worker's own device."""
        opened = self._transport.open(receipt, self._spec)
        if self._device.type != "cpu":
            return replace(opened, state=opened.state.to(self._device))
        return opened

    def release(self, receipt: Any) -> None:
        """Free a state."""
        self._transport.release(receipt)

    def close(self) -> None:
        """Free everything."""
        self._transport.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBuilder:
    """Builds a worker in a place of its own: a process or an actor. Pickles."""

    model: str
    dtype: str
    engine: EngineConfig
    device: str = "cpu"
    transport: Transport = "shared-memory"
    transport_bytes: int = 1 << 30
    """Of states that wait to be fetched."""

    def __call__(self) -> Worker:
        """Load the model, make its engine, and host it."""
        if self.engine.threads is not None:
            torch.set_num_threads(self.engine.threads)
        decoder = load_model(self.model, dtype=resolve_dtype(self.dtype, self.device), device=self.device)
        link = ModelStates(self._open_transport(decoder), decoder)
        return worker_of(decoder, load_tokenizer(self.model), self.engine, link=link)

    def _open_transport(self, decoder: Decoder) -> StateTransport:
        if self.transport == "shared-memory":
            from tandem.engine.shared_memory import SharedMemoryPool

            pool = SharedMemoryPool(_PREFIX, self.transport_bytes)
            pool.warm(min(WARM_BYTES, self.transport_bytes))
            return pool
        from tandem.serve.ray_states import RayObjectStates, RayTensorStates

        if self.transport == "ray":
            return RayObjectStates(self.transport_bytes)
        return RayTensorStates(self.transport_bytes, decoder.device)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBuilder:
    """Builds a worker in this process, over weights that all such workers share."""

    decoder: Decoder
    tokenizer: Tokenizer | None
    engine: EngineConfig

    def __call__(self) -> Worker:
        """Make an engine and host it; runs in the worker's own thread, whose number of threads is set here."""
        if self.engine.threads is not None:
            torch.set_num_threads(self.engine.threads)
        return worker_of(self.decoder, self.tokenizer, self.engine)


def worker_of(decoder: Decoder, tokenizer: Tokenizer | None, config: EngineConfig, *, link: StateLink | None = None) -> Worker:
    """A worker around a new engine, on the clock that all of this process use."""
    engine = Engine(decoder, tokenizer=tokenizer, config=config, clock=time.monotonic)
    size = engine.size
    tokens = size.max_tokens(config) if size.block_bytes else size.num_slots * engine.max_context
    capacity = Capacity(max_context=engine.max_context, max_batch=config.max_batch, tokens=tokens)
    return Worker(engine, capacity, clock=time.monotonic, link=link)


def sweep_states() -> None:
    """Remove what processes that were killed left of their shared memory: nothing on Linux, where it has no name."""
    from tandem.engine.shared_memory import sweep

    sweep(_PREFIX)


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` as the 16 bits that suit a device: bfloat16 on a GPU; on a CPU float16, where activations stay fp32. (bfloat16
    activations are faster on some CPUs, and turn close calls of small models: SmolLM2 then misses the capital of France.)
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") else "float16"
