"""A tokenizer of one's own: byte-level BPE whose digits stand alone, with the special tokens of Nemotron-Nano-2."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tandem.model.tokenizer import SETTINGS, TOKENIZER, Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CONTROL = (PAD, BOS, EOS, *(f"<SPECIAL_{i}>" for i in range(3, 13)))
"""Tokens 0 to 12, which decoding leaves out. Chats use 10 (system), 11 (turns) and 12 (end of a turn)."""
MARKS = (
    *("<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>"),
    *("<TOOL_RESPONSE>", "</TOOL_RESPONSE>", "<AVAILABLE_TOOLS>", "</AVAILABLE_TOOLS>"),
)
"""Tokens 13 to 20, each one token wherever it stands; decoding keeps them."""
_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens for such texts; the same texts in the same order give the same.

    Any text can be encoded and comes back as it was: no normalisation, and all 256 bytes are tokens. Raises SpecError for a
    vocabulary that does not hold these.
    """
    least = len(CONTROL) + len(MARKS) + _BYTES
    if vocab_size < least:
        raise SpecError(f"data.tokenizer.vocab_size={vocab_size}: must be at least {least}: special tokens and 256 bytes")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (*CONTROL, *MARKS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, CONTROL.index(BOS))]
    )
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    return Tokenizer(Backend.from_str(json.dumps(content)), special=_special())


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers' AutoTokenizer read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TOKENIZER, str(tokenizer.backend.to_str(pretty=True)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokenizer.special}
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _special() -> dict[str, str]:
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
