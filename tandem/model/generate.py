"""Text out of one decoder, one sequence at a time: what `tandem generate` runs. Many requests at once are the engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many are.

    Temperature 0 takes the likeliest token; above it, tokens are drawn from the smallest set whose probability reaches
    `top_p`, the same ones for the same seed.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_int("max_tokens", self.max_tokens)
        require_int("seed", self.seed, low=0, high=2**63 - 1)
        if not 0 <= self.temperature <= 100:
            raise SpecError(f"temperature={self.temperature!r}: must be from 0 to 100")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p={self.top_p!r}: must be above 0 and at most 1")


def generate_tokens(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, through one of the model's ends (included) or as many as were asked for.

    Raises SpecError, before anything is computed, for an empty prompt or one that leaves no room in the model's context.
    """
    if not prompt:
        raise SpecError("prompt: has no tokens; give some text")
    room = model.spec.max_context - len(prompt)
    if room < 1:
        raise SpecError(f"prompt: has {len(prompt):,} tokens; the model reads fewer than {model.spec.max_context:,}")
    return _generate(model, prompt, min(sampling.max_tokens, room), sampling)


def _generate(model: Decoder, prompt: Sequence[int], count: int, sampling: Sampling) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    state = model.new_state(1, capacity=len(prompt) + count)
    kept, state = model.prefill(torch.tensor([list(prompt)], device=model.device), state)
    logits = kept[0, -1]
    for left in range(count - 1, -1, -1):
        token = sample(logits.cpu(), sampling, generator)
        yield token
        if token in model.token_ids.eos or not left:
            return
        following, state = model.decode(torch.tensor([token], device=model.device), state)
        logits = following[0]


def sample(logits: Float[Tensor, " vocab"], sampling: Sampling, generator: torch.Generator) -> int:
    """One token from its logits."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        kept = int((ordered.cumsum(-1) < sampling.top_p).sum()) + 1
        return int(tokens[torch.multinomial(ordered[:kept], 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
