"""Torch's side of an engine: a pass over one prompt, and a decode step over the paged state of many sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tandem.engine.cache import PagedState
from tandem.model.hybrid import Decoder
from tandem.model.native.program import program_for
from tandem.model.state import AttentionState, MambaState, SequenceState
from tandem.spec.errors import Infeasible


class Runner:
    """Computes passes and steps of one decoder."""

    def __init__(self, model: Decoder, paged: PagedState, *, threads: int | None) -> None:
        self.model = model
        self._paged = paged
        self._threads = threads

    @torch.no_grad()
    def prefill(
        self, tokens: Sequence[int], state: SequenceState, *, last: bool, after_layer: Callable[[int], None] | None
    ) -> Float[Tensor, "1 vocab"] | None:
        """One pass over tokens of a prompt, whose state is continued; logits of the last token where it is the prompt's."""
        ids = torch.tensor([tokens], device=self.model.device)
        hidden = self.model.hidden_states(ids, state=state, after_layer=after_layer)
        if not last:
            return None
        logits: Tensor = self.model.lm_head(hidden[:, -1])
        return logits.float()

    @torch.no_grad()
    def decode(
        self, ids: Sequence[int], lengths: Sequence[int], slots: Sequence[int], blocks: np.ndarray
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of one more token of each sequence; its keys, values and state are written where it lies.

        `lengths` are the tokens before this one, `blocks` [rows, width] the blocks of each sequence in order.
        """
        size = self._paged.block_size
        width = max(lengths) // size + 1
        table = torch.from_numpy(np.ascontiguousarray(blocks[:, :width]))
        next_ids, known = torch.tensor(ids), torch.tensor(lengths)
        if self.model.device.type == "cpu":
            program = program_for(self.model)
            if not isinstance(program, Infeasible):
                return program.run(
                    next_ids, known, self._paged.layers, blocks=table, block_size=size,
                    slots=torch.tensor(slots), threads=self._threads,
                )  # fmt: skip
        return self._decode_by_torch(next_ids, known, torch.tensor(slots), table)

    def _decode_by_torch(self, ids: Tensor, lengths: Tensor, slots: Tensor, table: Tensor) -> Float[Tensor, "rows vocab"]:
        """The same with torch's operators, on a GPU or without a compiler: states are gathered, and what is new put back."""
        device, size = self.model.device, self._paged.block_size
        at, slots, rows = table.long().to(device), slots.to(device), torch.arange(len(ids), device=device)
        gathered: list[AttentionState | MambaState | None] = []
        for paged in self._paged.layers:
            if isinstance(paged, AttentionState):
                gathered.append(AttentionState(*(t[at].transpose(1, 2).flatten(2, 3) for t in paged.tensors)))
            elif isinstance(paged, MambaState):
                gathered.append(MambaState(*(t[slots] for t in paged.tensors)))
            else:
                gathered.append(None)
        state = SequenceState(lengths.clone(), tuple(gathered))
        logits, state = self.model.decode(ids.to(device), state)
        here = lengths.to(device)
        for paged, own in zip(self._paged.layers, state.layers, strict=True):
            if isinstance(paged, AttentionState) and isinstance(own, AttentionState):
                for pages, tokens in zip(paged.tensors, own.tensors, strict=True):
                    pages[at[rows, here // size], :, here % size] = tokens[rows, :, here]
            elif isinstance(paged, MambaState) and isinstance(own, MambaState):
                for pages, tensor in zip(paged.tensors, own.tensors, strict=True):
                    pages[slots] = tensor
        return logits
