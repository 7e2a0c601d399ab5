"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import distributed

from tandem.spec.errors import SpecError

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for one: the first may have a large corpus to prepare."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of every rank's value, the same on all."""
        if self.world == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(held)
        return float(held)

    def by_first(self, work: Callable[[], None]) -> None:
        """The first rank does `work` while the others wait; what it refuses, all refuse."""
        wrong: list[str | None] = [None]
        if self.first:
            try:
                work()
            except SpecError as refused:
                if self.world == 1:
                    raise
                wrong = [str(refused)]
        if self.world > 1:
            distributed.broadcast_object_list(wrong)
        if wrong[0] is not None:
            raise SpecError(wrong[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process in the run that torchrun's environment describes; alone without one.

    The backend is gloo on CPUs and NCCL, with gloo beside it for checkpoints, on GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise SpecError(f"LOCAL_RANK={local}: this machine has {torch.cuda.device_count()} GPUs; start as many ranks")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(device=device)
        return
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=distributed.get_rank(), world=world, device=device)
    finally:
        distributed.destroy_process_group()
