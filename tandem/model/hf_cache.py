"""What `generate` carries from token to token: a `SequenceState`, and how many columns of its input were read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from tandem.model.hybrid import Decoder
from tandem.model.state import SequenceState


@dataclass
class TandemCache:
    """A state in the shape that transformers' `generate` handles. The model continues it in place.

    `columns` counts those of `attention_mask`, padding included: a row of the state holds only its tokens, so rows of a
    left-padded batch differ in length.
    """

    state: SequenceState
    columns: int = 0

    is_compileable: ClassVar[bool] = False
    is_linear: ClassVar[tuple[bool, ...]] = (False,)
    """`generate` leaves out the tokens that were read where not every layer is said to be linear."""
    is_croppable: ClassVar[bool] = False
    """A recurrent state cannot go back, so assisted decoding is refused (`_is_stateful`)."""

    @classmethod
    def fresh(cls, decoder: Decoder, batch: int) -> TandemCache:
        """The cache of `batch` rows that have read nothing."""
        return cls(decoder.new_state(batch))

    def take(self, columns: int) -> SequenceState:
        """The state, for the caller to put that many further tokens in."""
        self.columns += columns
        return self.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, the same for every layer."""
        return self.columns

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        rows = beam_idx.tolist()
        if rows != list(range(self.state.batch)):
            self.state = self.state.slice(rows)
