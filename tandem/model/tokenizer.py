"""Text to token ids and back: the tokenizer of a checkpoint folder or a GGUF file, and its chat template.

A folder's tokenizer.json is read by the library `tokenizers`. GGUF files hold a vocabulary, merges and the name of a
pre-tokenizer, from which the same is built; byte-level BPE with the splits in `_SPLITS` is known, as llama.cpp
(`src/llama-vocab.cpp`) and the models' own tokenizer.json state them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from tandem.spec.catalog import find_weights, read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.gguf import GgufHeader, read_header

if TYPE_CHECKING:
    from jinja2 import Template

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Encodes and decodes text, and renders chats where the checkpoint has a template for them."""

    def __init__(self, backend: Backend, *, template: str | None = None, special: dict[str, str] | None = None) -> None:
        self.backend = backend
        self.template = template
        self.special = special or {}
        """Texts of special tokens by the names that templates use: bos_token, eos_token, pad_token."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with a leading begin-of-text where the tokenizer adds one. A rendered chat brings its own."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in pieces of whole characters that add up to `decode` of all."""
        stream, seen, given = DecodeStream(skip_special_tokens=True), [], 0
        for token in ids:
            seen.append(token)
            piece = stream.step(self.backend, token)
            if piece:
                given += len(piece)
                yield piece
        rest = self.decode(seen)[given:]
        if rest:
            yield rest

    def chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """A conversation as the text that the model was trained on. Raises SpecError without a template, or if it refuses."""
        if self.template is None:
            raise SpecError("chat_template: this model has none; give the text itself")
        return render_template(
            self.template, messages=messages, add_generation_prompt=add_generation_prompt, **self.special, **variables
        )


def render_template(template: str, **variables: Any) -> str:
    """A chat template's text for such variables, as transformers renders it. Raises SpecError where the template refuses them.

    What stands in `{% generation %}` blocks is put between the variables `generation_begin` and `generation_end`.
    """
    from jinja2 import TemplateError

    try:
        text: str = _compiled(template).render(**variables)
        return text
    except (TemplateError, TypeError) as wrong:
        raise SpecError(f"chat_template: {' '.join(str(wrong).split())}") from None


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    """A chat template ready to render: compiling takes far longer than rendering. It holds no state between renderings."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from tandem.model.generation_tag import GenerationTag

    extensions = [loopcontrols, GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise SpecError(f"chat_template: {message}")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, a GGUF file or a packaged model's name. Raises SpecError where there is none."""
    path = find_weights(name_or_path)
    return _from_gguf(read_header(path)) if path.is_file() else _from_folder(path)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer of a checkpoint folder or GGUF file into another folder, in files that transformers reads too."""
    if source.is_dir():
        for name in _FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer = _from_gguf(read_header(source))
    write_whole(folder / TOKENIZER, str(tokenizer.backend.to_str(pretty=True)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokenizer.special}
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if tokenizer.template is not None:
        write_whole(folder / TEMPLATE, tokenizer.template)


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / TOKENIZER
    if not file.is_file():
        raise SpecError(f"model={str(folder)!r}: holds no {TOKENIZER}, so text cannot be turned into tokens")
    try:
        backend = Backend.from_file(str(file))
    except Exception as wrong:  # The library raises bare Exception.
        raise SpecError(f"{file}: cannot be read ({' '.join(str(wrong).split())})") from None
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return Tokenizer(backend, template=template, special=special)


def _from_gguf(header: GgufHeader) -> Tokenizer:
    field = {name.removeprefix("tokenizer.ggml."): value for name, value in header.metadata.items()}
    if field.get("model") != "gpt2":
        raise SpecError(f"tokenizer.ggml.model={field.get('model')!r}: only gpt2, byte-level BPE, is read from GGUF")
    split = field.get("pre")
    if split not in _SPLITS:
        raise SpecError(f"tokenizer.ggml.pre={split!r}: not known; {', '.join(_SPLITS)} are")
    tokens, kinds = field["tokens"], field.get("token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in field.get("merges", ())]
    whole_words = split in _LLAMA3
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole_words))
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _SPLITS[split]()
    backend.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [tokens[i] for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    texts = {name: tokens[field[key]] for name, key in names.items() if key in field}
    if field.get("add_bos_token", whole_words) and "bos_token" in texts:
        bos = texts["bos_token"]
        ends = [(bos, field["bos_token_id"])]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ends)
    return Tokenizer(backend, template=header.metadata.get("tokenizer.chat_template"), special=texts)


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> Any:
    """Words as in tiktoken's cl100k, then bytes; `digits` says how many digits make one piece."""
    words = pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "qwen2": lambda: _split(""),
    **dict.fromkeys(_LLAMA3, lambda: _split("{1,3}")),
}
