"""The learning rate at every step: warm-up, stable, decay (WSD; paper A, section 2.5)."""

from __future__ import annotations

from tandem.train.recipe import OptimiserPart


def learning_rate(step: int, steps: int, part: OptimiserPart) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`.

    It rises in a straight line to `lr` over the warm-up, stays, and falls in a straight line over the last `decay` of the
    steps, so that the last step has `min_lr` exactly. A constant schedule only warms up. The shape of paper A's decay is not
    published; its length (18 % of the tokens) and both ends are.
    """
    warm = warmup_steps(steps, part)
    if step < warm:
        return part.lr * (step + 1) / warm
    begin = decay_begins(steps, part)
    if step < begin:
        return part.lr
    return part.min_lr + (part.lr - part.min_lr) * (steps - 1 - step) / (steps - begin)


def warmup_steps(steps: int, part: OptimiserPart) -> int:
    """Steps of the warm-up."""
    return round(part.warmup * steps)


def decay_begins(steps: int, part: OptimiserPart) -> int:
    """The first step of the decay; `steps` where there is none."""
    return steps if part.schedule == "constant" else steps - round(part.decay * steps)
