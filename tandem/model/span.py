"""Where the tokens of one forward pass stand: how many of each row, after how many, in which document."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One pass over `time` token columns. Rows are filled from the left; what is right of a row's length is padding."""

    time: int
    device: torch.device
    lengths: Int[Tensor, " batch"] | None = None
    """Valid tokens of each row, on the CPU; None where every row is full."""
    starts: Int[Tensor, " batch"] | None = None
    """Tokens that the state already holds, on the CPU; None where it holds none."""
    segments: Int[Tensor, "batch time"] | None = None
    """Running number of the document that each token belongs to, from 0 in every row; None for one document a row.

    There are no `starts` then: a state holds one document a row.
    """

    @cached_property
    def start(self) -> int | None:
        """Tokens before this pass where all rows agree, else None."""
        if self.starts is None:
            return 0
        known = self.starts.tolist()
        return known[0] if len(set(known)) == 1 else None

    @cached_property
    def valid(self) -> Bool[Tensor, "batch time"] | None:
        """Which columns hold a token, None where all do."""
        if self.lengths is None:
            return None
        return torch.arange(self.time, device=self.device) < self.lengths.to(self.device)[:, None]

    @cached_property
    def positions(self) -> Int[Tensor, "rows time"]:
        """Position of each token in its document; one row where all rows agree."""
        steps = torch.arange(self.time, device=self.device)[None]
        if self.segments is not None:
            first = torch.cat([torch.ones_like(self.segments[:, :1]), self.segments.diff(dim=1)], 1).bool()
            return steps - torch.where(first, steps, 0).cummax(1).values
        return steps + self.start if self.start is not None else steps + self._starts_column

    @property
    def _starts_column(self) -> Int[Tensor, "rows 1"]:
        if self.starts is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.starts.to(self.device)[:, None]

    def mask(self, slots: int) -> Bool[Tensor, "rows 1 time slots"]:
        """Which of `slots` cached tokens each token sees: those before it and itself, of its own document."""
        steps = torch.arange(self.time, device=self.device)[None] + self._starts_column  # row's slot of each token
        seen = torch.arange(slots, device=self.device) <= steps[..., None]
        if self.segments is not None:
            seen = seen & (self.segments[:, None] == self.segments[..., None])
        return seen[:, None]


def compact(
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Float[Tensor, "batch time"] | Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, " batch"], Int[Tensor, "batch time"]]:
    """Rows moved left, so that padding is on the right: tokens, lengths (on the CPU), the new column of each old one."""
    kept = attention_mask.bool()
    order = torch.argsort((~kept).int(), dim=1, stable=True)
    lengths = kept.sum(1).cpu()
    return input_ids.gather(1, order), lengths, order.argsort(1)
