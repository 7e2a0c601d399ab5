"""Outputs that must follow a grammar: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import threading

import numpy as np
from llguidance import LLMatcher, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from tandem.engine.types import Grammar
from tandem.spec.errors import SpecError

MAX_TEXT = 131_072
"""Characters of the longest schema or grammar that is read."""
_STACK_BYTES = 256 << 20
"""llguidance compiles chains of rules by recursion. A thread's usual 8 MiB end the process at some 2000 rules."""
_STACK_LOCK = threading.Lock()
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of a JSON text. Bounded, or a weak model may write nothing else."""


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """The start state of a grammar, to be copied for each request. Raises SpecError for one that cannot be followed."""
    if len(grammar.text) > MAX_TEXT:
        raise SpecError(f"grammar.text={len(grammar.text):,} characters: must be at most {MAX_TEXT:,}")
    source = _source(grammar)
    made: list[LLMatcher] = []
    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: made.append(LLMatcher(tokenizer, source, log_level=0)))
            thread.start()
        except RuntimeError as wrong:
            raise SpecError(f"grammar.kind={grammar.kind}: cannot be compiled now ({wrong})") from None
        finally:
            threading.stack_size(before)
    thread.join()
    if not made or made[0].is_error():
        raise _refusal(grammar, made[0].get_error() if made else "the compiler failed")
    return made[0]


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form. In a regex, digits, word characters and white space are those of ASCII."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, use_ascii='dws')}/")
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    text = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
    try:
        if not isinstance(json.loads(text), (dict, bool)):
            raise SpecError("grammar.json_schema: must be an object or a boolean")
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE_SPACE})
    except SpecError:
        raise
    except (ValueError, RecursionError) as wrong:
        raise _refusal(grammar, str(wrong)) from None


def _refusal(grammar: Grammar, reason: str) -> SpecError:
    reason = " ".join(reason.split())
    return SpecError(f"grammar.kind={grammar.kind}: the text does not compile ({reason[:200]})")


class GrammarState:
    """How far one output has followed its grammar."""

    def __init__(self, start: LLMatcher, *, vocab_size: int, ends: frozenset[int]) -> None:
        self._matcher = start.deep_copy()
        self._vocab_size = vocab_size
        self._ends = ends
        self._end_ids = np.array(sorted(ends), dtype=np.intp)
        self.finished = False
        """Whether nothing more can come, or an end token has."""
        self.error: str | None = None
        """Why the grammar can be followed no longer: a limit of the parser, or a token that it does not allow."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, one flag each. End tokens may exactly where the text so far is whole."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        inside = flags[self._end_ids]
        flags[self._end_ids] = self._matcher.is_accepting()
        if not flags.any():
            flags[self._end_ids] = inside
        return flags

    def accept(self, token: int) -> None:
        """Read the next output token."""
        if self.finished:
            return
        if token in self._ends and self._matcher.is_accepting():
            self.finished = True
            return
        if not self._matcher.consume_token(token):
            told = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
            self.error = f"grammar.text: {told or f'token {token} does not follow it'}"
        self.finished = self._matcher.is_stopped()
