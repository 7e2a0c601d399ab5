"""What tests of Ray's actors share. An actor imports this module, so it imports nothing slow."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.transfer import StateLayout
from tandem.engine.types import EngineRequest
from tandem.model.hybrid import Decoder
from tandem.serve.messages import Capacity
from tandem.serve.ray_host import RayHost
from tandem.serve.ray_states import RayObjectStates
from tandem.serve.worker import Worker
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2, conv_kernel=4, conv_bias=True, proj_bias=False)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
SPEC = ModelSpec(
    name="small",
    vocab_size=259,
    hidden_size=32,
    layers=(MAMBA, MLP(ffn_size=48, gated=False), ATTENTION, MAMBA, MLP(ffn_size=48, gated=False)),
    tied_embeddings=False,
    max_context=512,
)


def actor(name: str, build: Callable[[], Worker], **options: Any) -> RayHost:
    """With the folders that pytest put on the path, for these tests' own modules."""
    return RayHost(name, build, environment={"PYTHONPATH": os.pathsep.join(sys.path)}, **options)


class Link:
    """States of the model through Ray's object store."""

    def __init__(self) -> None:
        self.states = RayObjectStates(64 << 20)
        self.open = partial(self.states.open, spec=SPEC)
        self.release, self.close = self.states.release, self.states.close

    def sink(self, asked: EngineRequest) -> Any:
        return self.states.sink(StateLayout(spec=SPEC, tokens=len(asked.prompt_ids) + len(asked.output_ids)))


def worker(by_reference: bool) -> Worker:
    """The engine on a model whose logits are of order one and far apart."""
    torch.set_num_threads(1)
    model, random = Decoder(SPEC).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=random)
    config = EngineConfig(max_batch=8, cache_bytes=4 << 20, threads=1)
    engine = Engine(model, config=config, clock=time.monotonic)
    capacity = Capacity(max_context=engine.max_context, max_batch=8, tokens=engine.size.num_blocks * config.block_size)
    return Worker(engine, capacity, clock=time.monotonic, link=None if by_reference else Link())
