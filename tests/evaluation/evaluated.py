"""Small checkpoints with and without a chat template, and a writer that writes what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from small_models import small_model
from toys import byte_tokenizer

from tandem.align.chat import save_chat_tokenizer
from tandem.evaluation.form import Prompt
from tandem.evaluation.settings import EvaluationSettings
from tandem.evaluation.subject import Subject
from tandem.evaluation.writer import Written
from tandem.model.load import load_model, save_model
from tandem.model.tokenizer import load_tokenizer

PLAIN = ("<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>", "<TOOL_RESPONSE>", "</TOOL_RESPONSE>")
SPECIAL = tuple(f"<SPECIAL_{i}>" for i in range(3, 13))
VOCABULARY = 3 + 256 + len(SPECIAL) + len(PLAIN)


def save_base(folder: Path, *, kind: str = "hybrid", context: int = 512, seed: int = 0) -> Path:
    """A random decoder over bytes, the marks of Nemotron Nano 2 and its special tokens; no template."""
    save_model(small_model(kind, vocabulary=VOCABULARY, context=context, seed=seed), folder)
    byte_tokenizer(special=SPECIAL, plain=PLAIN).backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_chat(folder: Path, base: Path) -> Path:
    """The same with the chat template."""
    model = load_model(base)
    model.source = None
    save_model(model, folder)
    save_chat_tokenizer(base, folder)
    return folder


def subject_of(folder: Path, **settings: Any) -> Subject:
    return Subject(folder.name, load_model(folder), load_tokenizer(folder), EvaluationSettings(**settings))


class ScriptedWriter:
    """Writes what `answer` says to the text of each prompt."""

    max_context = 4096

    def __init__(self, subject: Subject, answer: Callable[[str], Written]) -> None:
        self._tokenizer, self._answer = subject.tokenizer, answer
        self.seeds: list[int] = []
        subject.__dict__["writer"] = self

    def write(self, prompts: Sequence[Prompt], sampling: Any, *, seeds: Sequence[int], tick: Any = None) -> list[Written]:
        self.seeds += seeds
        return [self._answer(self._tokenizer.decode(prompt.ids, skip_special_tokens=False)) for prompt in prompts]


def written(text: str, **fields: Any) -> Written:
    marks = text.count("</think>")
    whole = {"finished": True, "closing_marks": marks, "forced": False, "thinking_tokens": 3, "answer_tokens": 2, **fields}
    return Written(text=text, **whole)
