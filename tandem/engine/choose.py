"""Choosing the next token of each sequence in a batch.

For one row of logits, in this order: log-probabilities are taken of the logits as they are; then penalties and bias, the
grammar, the thinking budget, temperature, top-k, top-p, min-p and the draw. Each row is worked on alone, in an order of
operations that depends on nothing but itself, so a request's tokens do not depend on what it is served with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.engine.draw import Row, Rows, draw, draw_rows, uniform
from tandem.engine.penalties import Penalties
from tandem.engine.thinking import Thinking
from tandem.engine.types import EngineRequest, Logprobs
from tandem.engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tandem.engine.grammar import GrammarState

_SMALL = 8192
"""Tokens of a vocabulary up to which rows are drawn together."""
_NEAR_NATS, _NEAR_TOKENS = 6.0, 2048
"""Alternatives are looked for so far below the likeliest token, and everywhere if these are too few or too many to sort."""


class Choice(NamedTuple):
    """A chosen token, with log-probabilities where the request asks for them."""

    token_id: int
    logprobs: Logprobs | None


class Chooser:
    """What one request's next token depends on besides its logits. It follows from the request's tokens alone, so a request
    that goes on elsewhere goes on the same."""

    def __init__(self, request: EngineRequest, vocabulary: Vocabulary) -> None:
        """Reads the prompt and the tokens so far. Raises SpecError as `Vocabulary.check` does."""
        sampling = request.sampling
        self.sampling = sampling
        self.position = 0
        self._penalties = Penalties(sampling, request.prompt_ids) if Penalties.asked(sampling) else None
        self._thinking: Thinking | None = None
        if sampling.thinking_budget is not None or (request.thinking and vocabulary.tokenizer is not None):
            self._thinking = Thinking(
                vocabulary.closing_tag, vocabulary.spelling, budget=sampling.thinking_budget, opened=request.thinking
            )
        self._grammar: GrammarState | None = None
        self._ends = np.array(sorted({*vocabulary.eos, *sampling.stop_token_ids}), dtype=np.intp)
        if sampling.grammar is not None:
            from tandem.engine.grammar import GrammarState  # here: plain generation needs no llguidance

            ends = frozenset(int(token) for token in self._ends)
            start = vocabulary.grammar(sampling.grammar)
            self._grammar = GrammarState(start, vocab_size=vocabulary.vocab_size, ends=ends)
        self._greedy = sampling.temperature == 0 and sampling.logprobs is None
        self._stateless = self._greedy and self._penalties is None and self._grammar is None and self._thinking is None
        self._free = (  # of every token, by nothing but its logit
            sampling.temperature > 0
            and (sampling.top_k, sampling.top_p, sampling.min_p) == (None, 1.0, 0.0)
            and sampling.logprobs in (None, 0)
            and self._penalties is None
            and self._grammar is None
        )
        self._failure: str | None = None
        for token in request.output_ids:
            self.accept(token)

    @property
    def finished_by_grammar(self) -> bool:
        """Whether the output is whole: the grammar has no more to come."""
        return self._grammar is not None and self._grammar.finished

    @property
    def error(self) -> str | None:
        """Why the output cannot go on: one line, for the client. Its grammar cannot be followed, or logits are no numbers."""
        return self._failure or (None if self._grammar is None else self._grammar.error)

    @property
    def thinking_tokens(self) -> int:
        """Output tokens of the thinking block so far, with those of its closing tag."""
        return 0 if self._thinking is None else self._thinking.tokens

    @property
    def likeliest(self) -> bool:
        """Whether the next token is simply the one of the highest logit."""
        if self._stateless:
            return True
        return self._greedy and self._penalties is None and self._grammar is None and not self._bound

    @property
    def free(self) -> bool:
        """Whether the next token is drawn from the softmax of all logits, and of log-probabilities its own at most wanted."""
        return self._free and not self._bound

    @property
    def _bound(self) -> bool:
        """Whether the thinking budget has a say in the next token."""
        return self._thinking is not None and (self._thinking.forced is not None or self._thinking.forbidden is not None)

    def accept(self, token: int) -> None:
        """Take note of the next output token."""
        if self._stateless:
            return
        self.position += 1
        if self._penalties is not None:
            self._penalties.accept(token)
        thought = False
        if self._thinking is not None:
            thought = self._thinking.open
            self._thinking.accept(token)
        if self._grammar is not None and not thought:
            self._grammar.accept(token)

    def pick(self, row: Row) -> Choice:
        """The next token of a row of logits, which is left as it is, and of which this takes note."""
        if not np.isfinite(row.max()):
            return self.fail()
        token = None if self._thinking is None else self._thinking.forced
        if token is None:
            token = self._draw(self._allowed(row))
        count = self.sampling.logprobs
        choice = Choice(token, None if count is None else log_probabilities(self._tempered(row), token, count))
        self.accept(token)
        return choice

    def _tempered(self, row: Row) -> Row:
        """The row that log-probabilities are taken of."""
        heat = self.sampling.temperature
        return row * np.float32(1.0 / heat) if self.sampling.tempered_logprobs and heat > 0 else row

    def fail(self) -> Choice:
        """What is chosen where the highest logit is not a number: anything, beside an `error`. It must not stop the others."""
        self._failure = "the model's numbers overflow after these tokens"
        return Choice(0, None)

    def _draw(self, row: Row) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(row.argmax())
        return draw(
            row,
            number=uniform(sampling.seed, self.position),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    def _allowed(self, row: Row) -> Row:
        """The row after penalties, with -inf for what may not be chosen."""
        thinking, grammar = self._thinking, self._grammar
        forbidden = None if thinking is None else thinking.forbidden
        if self._penalties is None and grammar is None and forbidden is None:
            return row
        row = row.copy()
        if self._penalties is not None:
            self._penalties.apply(row)
        if grammar is not None and thinking is not None and thinking.open:
            forbidden = np.concatenate([self._ends, thinking.overshooting])
        elif grammar is not None:
            allowed = grammar.allowed()
            row[~allowed] = -np.inf
            if row.max() == -np.inf:
                row[allowed] = 0.0
        if forbidden is not None:
            before = row[forbidden]
            row[forbidden] = -np.inf
            if row.max() == -np.inf:  # a grammar may ask for just what is forbidden
                row[forbidden] = before
        return row


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """The next token of each row of logits (rows, vocabulary; fp32), of which each row's chooser takes note."""
    if logits.shape[0] != len(choosers):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(choosers)} choosers")
    likeliest = [chooser.likeliest for chooser in choosers]
    choices: list[Choice | None] = [None] * len(choosers)
    logits = logits.detach()
    if any(likeliest):
        for i, token in enumerate(_argmax(logits)):
            if not likeliest[i]:
                continue
            if token is None:
                choices[i] = choosers[i].fail()
            else:
                choices[i] = Choice(token, None)
                choosers[i].accept(token)
    free = [i for i, chooser in enumerate(choosers) if not likeliest[i] and chooser.free]
    if len(free) > 1 and logits.shape[1] <= _SMALL:
        rows = logits[free].float().cpu().numpy()
        for i, choice in zip(free, draw_together(rows, [choosers[i] for i in free]), strict=True):
            choices[i] = choice
    for i, chooser in enumerate(choosers):
        if choices[i] is None:
            choices[i] = chooser.pick(logits[i].float().cpu().numpy())
    return [choice for choice in choices if choice is not None]


def draw_together(rows: Rows, choosers: Sequence[Chooser]) -> list[Choice]:
    """`Chooser.pick` for rows [rows, vocabulary] whose choosers are all `free`: the same choices."""
    sound = np.isfinite(rows.max(1))
    rows = rows if sound.all() else np.where(sound[:, None], rows, np.float32(0.0))
    sampling = [chooser.sampling for chooser in choosers]
    numbers = [uniform(chooser.sampling.seed, chooser.position) for chooser in choosers]
    tokens = draw_rows(rows, numbers=numbers, temperatures=[one.temperature for one in sampling])
    logprobs: list[Logprobs | None] = [None] * len(choosers)
    if any(one.logprobs is not None for one in sampling):
        heat = np.array([1.0 / one.temperature if one.tempered_logprobs else 1.0 for one in sampling], dtype=np.float32)
        warm = rows * heat[:, None]
        highest = warm.max(1)
        sums = np.exp(warm - highest[:, None]).astype(np.float64).sum(1)
        own = warm[np.arange(len(warm)), tokens] - (highest.astype(np.float64) + np.log(sums))
        logprobs = [
            None if one.logprobs is None else Logprobs(token, value, ())
            for one, token, value in zip(sampling, tokens, own.tolist(), strict=True)
        ]
    choices = []
    for good, chooser, token, listed in zip(sound.tolist(), choosers, tokens, logprobs, strict=True):
        if good:
            chooser.accept(token)
        choices.append(Choice(token, listed) if good else chooser.fail())
    return choices


def _argmax(logits: Tensor) -> list[int | None]:
    """The highest logit of each row, the lowest id of equals; None where it is not a number. On CPUs numpy takes an eighth of
    torch's time."""
    found = logits.argmax(-1) if logits.device.type != "cpu" else torch.from_numpy(logits.float().numpy().argmax(-1))
    sound = logits.gather(-1, found[:, None])[:, 0].isfinite()
    return [token if good else None for token, good in zip(found.tolist(), sound.tolist(), strict=True)]


def log_probabilities(row: Row, token: int, count: int) -> Logprobs:
    """Natural logarithms of the probabilities of a token and of the `count` likeliest, of a row of logits."""
    highest = row.max()
    total = float(highest) + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = np.flatnonzero(row >= highest - _NEAR_NATS)
        if not count <= len(ids) <= _NEAR_TOKENS:
            rest = max(0, len(row) - count)
            ids = np.flatnonzero(row >= np.partition(row, rest)[rest])
        ids = ids[np.argsort(-row[ids], kind="stable")][:count]
        top = tuple((int(i), float(row[i]) - total) for i in ids)
    return Logprobs(token, float(row[token]) - total, top)
