"""Accounts of a simulated worker, counted again from its requests."""

from __future__ import annotations

from tandem.sim.worker import SimWorker


def check(worker: SimWorker) -> None:
    """Raise RuntimeError unless blocks held and free are all blocks, and counts are those of its requests."""
    worker.settle()
    size = worker.limits.block_size
    chunk = {id(c.request): c.tokens for c in worker.chunks}
    held = sum(-(-request.computed // size) for _, _, request in worker.finishes)
    held += sum(-(-(request.computed + chunk.get(id(request), 0)) // size) for request in worker.begun)
    counts = (
        ("blocks", held + worker.free_blocks, worker.kind.blocks),
        ("queued tokens", worker.queued_tokens, sum(r.to_prefill for r in (*worker.waiting, *worker.begun, *worker.resumed))),
        ("running", worker.running, len(worker.finishes)),
        ("context", worker.decoding_tokens, sum(request.context for _, _, request in worker.finishes)),
        ("arrived", min(worker.incoming, len(worker.arrived)), len(worker.arrived)),
    )
    for what, counted, true in counts:
        if counted != true:
            raise RuntimeError(f"worker {worker.id}: {what} {counted}, should be {true}")
    if worker.free_blocks < 0:
        raise RuntimeError(f"worker {worker.id}: {-worker.free_blocks} blocks too many are held")


def unfinished(worker: SimWorker) -> list[tuple[int, int]]:
    """Row and output tokens so far of those who have some and are not done."""
    worker.settle()
    return [(r.row, r.osl) for r in (*worker.resumed, *worker.arrived, *(entry[2] for entry in worker.finishes))]
