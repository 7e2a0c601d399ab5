"""Step times in the form in which the simulator can skip over steps: tabulated once for a kind of worker.

    decode step of b sequences of C tokens in all:  base_s[b] + per_token_s[b] * C
    a chunk of n prompt tokens after c others:      chunk_s(n) + per_pair_s * (n * c + n * (n + 1) / 2)
    the same beside decoding sequences:             the decode step + mixed_s(n) + per_pair_s * pairs

The decode step is affine in the total context (DESIGN section 6): exact for full attention and for recurrent layers, a chord
for sliding windows. An instance whose attention groups and pipeline stages take prompts of their own has `groups` of them: a
step lasts as long as the group with the most tokens, so as long as its longest chunk, or as an even share of all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tandem.sched.batch import Chunk
from tandem.spec.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Seconds of steps of one kind of worker; implements `tandem.sched.route.StepTimes`."""

    base_s: Sequence[float]
    """By batch, from 0 (whose entry is 0) to the largest."""
    per_token_s: Sequence[float]
    """By batch: seconds for each token of context in the batch."""
    chunk_tokens: Sequence[float]
    """Nodes of `chunk_s` and `mixed_s`, from 1 upwards; beyond the last, times go on in a straight line."""
    chunk_s: Sequence[float]
    """A step that only prefills so many tokens, in one group, without what `per_pair_s` counts."""
    mixed_s: Sequence[float]
    """What so many prompt tokens add to a decode step."""
    per_pair_s: float = 0.0
    """For each pair of a prompt token and a token before it, or itself."""
    groups: int = 1
    spread_s: float = 0.0
    """For each prompt token outside the fullest group: experts do the work of all attention groups."""
    state_bytes: float = 0.0
    """Of one sequence, whatever its length, over one link."""
    state_bytes_per_token: float = 0.0
    link_bytes_per_s: float = 1e11
    first_token_s: float = 0.0
    """Between the end of a prefill and the first token at the client: host, sampling, HTTP."""
    last_layer: float = 1.0
    """Share of a state that cannot leave before its prefill ends: that of the last layer (paper B, section 3.2)."""

    def __post_init__(self) -> None:
        if len(self.base_s) != len(self.per_token_s) or len(self.base_s) < 2:
            raise SpecError(f"base_s has {len(self.base_s)}, per_token_s {len(self.per_token_s)} batches: need equal, >= 2")
        if not len(self.chunk_tokens) == len(self.chunk_s) == len(self.mixed_s) >= 2:
            raise SpecError(f"chunk_tokens has {len(self.chunk_tokens)} nodes: chunk_s and mixed_s need as many, >= 2")

    @cached_property
    def _nodes(self) -> list[float]:
        return list(self.chunk_tokens)

    def _at(self, values: Sequence[float], tokens: float) -> float:
        i = bisect_right(self._nodes, tokens) - 1
        i = 0 if i < 0 else min(i, len(self._nodes) - 2)
        left = self._nodes[i]
        return values[i] + (tokens - left) * (values[i + 1] - values[i]) / (self._nodes[i + 1] - left)

    def prefill_step_s(self, tokens: float, pairs: float) -> float:
        """A step that prefills `tokens` tokens in its fullest group, which attend to `pairs` pairs, and decodes nothing."""
        return self._at(self.chunk_s, tokens) + self.per_pair_s * pairs

    def mixed_step_s(self, batch: int, context_tokens: float, tokens: float, pairs: float) -> float:
        """The same beside `batch` decoding sequences of `context_tokens` tokens in all."""
        decode_s = self.base_s[batch] + self.per_token_s[batch] * context_tokens
        return decode_s + self._at(self.mixed_s, tokens) + self.per_pair_s * pairs

    def chunks_s(self, batch: int, context_tokens: float, chunks: Sequence[Chunk]) -> float:
        """A step with these chunks beside a decoding batch: as long as the attention group with the most to do."""
        elsewhere_s = 0.0
        if len(chunks) == 1:
            tokens: float = chunks[0].tokens
            pairs = tokens * (chunks[0].request.computed + (tokens + 1) / 2)
        else:
            each = [(c.tokens, c.tokens * (c.request.computed + (c.tokens + 1) / 2)) for c in chunks]
            whole = sum(t for t, _ in each)
            tokens = max(whole / self.groups, max(t for t, _ in each))
            pairs = max(sum(p for _, p in each) / self.groups, max(p for _, p in each))
            elsewhere_s = self.spread_s * (whole - tokens)
        if batch:
            return self.mixed_step_s(batch, context_tokens, tokens, pairs) + elsewhere_s
        return self.prefill_step_s(tokens, pairs) + elsewhere_s

    def prefill_s(self, tokens: int, context: int) -> float:
        """Prefilling `tokens` tokens of a prompt after `context` others whose state is there; 0 for none."""
        if tokens <= 0:
            return 0.0
        return self._at(self.chunk_s, tokens) + self.per_pair_s * tokens * (context + (tokens + 1) / 2)

    def decode_s(self, batch: int, context_tokens: float) -> float:
        """One decode step of `batch` sequences that are `context_tokens` long in all; 0 for none. A batch beyond the largest
        costs as much more as the last ones did."""
        last = len(self.base_s) - 1
        if batch <= last:
            return self.base_s[batch] + self.per_token_s[batch] * context_tokens if batch > 0 else 0.0
        slope = (self.base_s[last] - self.base_s[last // 2]) / (last - last // 2)
        return self.base_s[last] + slope * (batch - last) + self.per_token_s[last] * context_tokens

    def transfer_bytes(self, tokens: int) -> float:
        """Bytes that the state of `tokens` tokens puts on a link."""
        return self.state_bytes + self.state_bytes_per_token * tokens

    def transfer_s(self, tokens: int) -> float:
        """Seconds of moving the state of `tokens` tokens over a free link that stick out of their prefill; 0 for none."""
        if tokens <= 0:
            return 0.0
        seconds = self.transfer_bytes(tokens) / self.link_bytes_per_s
        return max(seconds * self.last_layer, seconds - self.prefill_s(tokens, 0) * (1.0 - self.last_layer))
