"""Which instance runs on which GPUs of which host: whole instances side by side, never one instance on a part of two hosts
where one holds it."""

from __future__ import annotations

from typing import NamedTuple

from tandem.plan.export.job import Instance, Job


class Place(NamedTuple):
    """A part of an instance on one host: `rank` 0 leads, `slot` tells ports of instances on one host apart."""

    instance: Instance
    number: int
    rank: int
    node: int
    leader: int
    first_gpu: int
    slot: int

    @property
    def gpus(self) -> str:
        """GPU numbers on the host, as CUDA_VISIBLE_DEVICES takes them."""
        return ",".join(str(self.first_gpu + i) for i in range(self.instance.gpus_here))


def place(job: Job) -> list[Place]:
    """Every part of every instance, prefill before decode, hosts filled one after the other."""
    found: list[Place] = []
    node, used, slot = 0, 0, 0
    for instance in job.instances:
        for number in range(instance.replicas):
            if used and used + instance.gpus_here > instance.gpus_per_node:
                node, used, slot = node + 1, 0, 0
            leader = node
            for rank in range(instance.nodes):
                if rank:
                    node, used, slot = node + 1, 0, 0
                found.append(Place(instance, number, rank, node, leader, used, slot))
                used, slot = used + instance.gpus_here, slot + 1
    return found


def num_nodes(places: list[Place]) -> int:
    """Hosts in use."""
    return places[-1].node + 1
