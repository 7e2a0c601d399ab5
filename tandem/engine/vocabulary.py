"""The tokens of one engine's model: their texts, its end tokens, its thinking tags and the grammars compiled for them."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING

from tandem.engine.spelling import Spelling
from tandem.engine.text import TextStream
from tandem.engine.thinking import CLOSING, ClosingTag
from tandem.engine.types import Grammar, SamplingParams
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_GRAMMARS = 64
"""Compiled grammars that are kept for later requests."""


class Vocabulary:
    """Token ids from 0 to vocab_size - 1 and, with a tokenizer, what they mean. Tables are made when first needed."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos: tuple[int, ...]) -> None:
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, eos
        self._grammars: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def check(self, sampling: SamplingParams) -> None:
        """Raise SpecError for sampling that this vocabulary cannot do: it is the moment to compile what will be needed."""
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise SpecError(f"{name}={token}: must be from 0 to {self.vocab_size - 1}, the model's vocabulary")
        if self.tokenizer is None:
            for name, asked in (
                ("stop", bool(sampling.stop)),
                ("thinking_budget", sampling.thinking_budget is not None),
                ("grammar", sampling.grammar is not None),
            ):
                if asked:
                    raise SpecError(f"{name}={getattr(sampling, name)!r}: needs a tokenizer, and this engine has none")
        if sampling.thinking_budget is not None and not self.closing_tag.tokens:
            raise SpecError(
                f"thinking_budget={sampling.thinking_budget}: this model's vocabulary cannot write {CLOSING}; leave it out"
            )
        if sampling.grammar is not None:
            self.grammar(sampling.grammar)

    def text_stream(self, sampling: SamplingParams) -> TextStream | None:
        """The text of one output; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, sampling.stop, sampling.skip_special_tokens, spelling=self.spelling)

    @cached_property
    def spelling(self) -> Spelling:
        """Bytes of tokens. Raises SpecError without a tokenizer."""
        return Spelling(self._needed("text"))

    @cached_property
    def closing_tag(self) -> ClosingTag:
        """The end of thinking. Raises SpecError without a tokenizer."""
        tokenizer = self._needed("thinking_budget")
        return ClosingTag(self.spelling, self.vocab_size, tokenizer.encode(CLOSING, add_special_tokens=False))

    def grammar(self, grammar: Grammar) -> LLMatcher:
        """The start state of a grammar; the most recent ones are kept. Raises SpecError for one that does not compile."""
        from tandem.engine.grammar import compile_grammar  # here: plain generation needs no llguidance

        start = self._grammars.get(grammar)
        if start is None:
            start = self._grammars[grammar] = compile_grammar(grammar, self._grammar_tokenizer)
            if len(self._grammars) > _GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(grammar)
        return start

    @cached_property
    def _grammar_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._needed("grammar").backend.to_str()
        if not self.eos:
            raise SpecError("grammar: needs a model with an end token, and this one names none")
        try:
            return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=list(self.eos))
        except ValueError as wrong:
            raise SpecError(f"grammar: cannot be used with this model's tokenizer ({' '.join(str(wrong).split())})") from None

    def _needed(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise SpecError(f"{name}: needs a tokenizer, and this engine has none")
        return self.tokenizer
