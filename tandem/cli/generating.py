"""`tandem generate`, and what `tandem inspect` says about the weights of a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.spec.errors import SpecError
from tandem.spec.local import usable_cores
from tandem.spec.units import require_int

if TYPE_CHECKING:
    from tandem.model.generate import Sampling
    from tandem.model.hybrid import Decoder
    from tandem.model.tokenizer import Tokenizer
    from tandem.spec.model import ModelSpec


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file or the name of an installed model.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from, or the question to a chat model.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws above temperature 0.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Weights in memory: auto (as stored), float32, float16, bfloat16, int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads, at most the cores; default: as torch finds.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text itself, without the model's chat template.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Let a model answer a prompt; the text appears as it is written (extra `[model]`)."""
    from tandem.spec.catalog import find_weights, load_spec

    if find_weights(model).is_dir():
        load_spec(model)  # names what is wrong with a folder that is no checkpoint
    _require_extra(threads)
    from tandem.model.generate import Sampling
    from tandem.model.load import load_model
    from tandem.model.tokenizer import load_tokenizer
    from tandem.report import text

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    tokenizer = load_tokenizer(model)
    chat = tokenizer.template is not None and not raw
    written = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizer.encode(written, add_special_tokens=not chat)
    started = time.perf_counter()
    with text.progress("loading"):
        decoder = load_model(model, dtype=dtype, device=device)
    load_s = time.perf_counter() - started
    data = {**_write(decoder, tokenizer, ids, sampling, quiet=json_out), "load_s": load_s}
    if json_out:
        from tandem.cli.app import emit

        return emit(data)
    if sys.stderr.isatty():
        text.progress_console().print(_summary(data), style="dim", highlight=False)


def _write(decoder: Decoder, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, *, quiet: bool) -> dict[str, Any]:
    """Generate, write the text as it comes unless `quiet`, and say what was done."""
    from tandem.model.generate import generate_tokens

    tokens: list[int] = []
    times = [time.perf_counter()]
    ends = decoder.token_ids.eos

    def noted() -> Iterator[int]:
        for token in generate_tokens(decoder, ids, sampling):
            times.append(time.perf_counter())
            tokens.append(token)
            if token not in ends:
                yield token

    pieces = []
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that a model writes
    try:
        for piece in tokenizer.stream(noted()):
            pieces.append(piece)
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        if not quiet and times[1:]:
            sys.stdout.write("\n")
    return {
        "model": decoder.spec.name,
        "text": "".join(pieces),
        "tokens": len(tokens),
        "token_ids": tokens,
        "prompt_tokens": len(ids),
        "finish_reason": "stop" if tokens[-1] in ends else "length",
        "ttft_s": times[1] - times[0],
        "tokens_per_s": (len(tokens) - 1) / (times[-1] - times[1]) if len(tokens) > 1 else None,
    }


def _summary(data: dict[str, Any]) -> str:
    from tandem.report.text import ms

    speed = "" if data["tokens_per_s"] is None else f", then {data['tokens_per_s']:,.1f} tokens/s"
    counts = f"{data['prompt_tokens']:,} tokens read, {data['tokens']:,} written ({data['finish_reason']})"
    return f"{counts}; loaded in {ms(data['load_s'])}, first token after {ms(data['ttft_s'])}{speed}"


def _require_extra(threads: int | None) -> None:
    """One line that says what to install where a package of the extra is missing; else torch gets its threads."""
    if threads is not None:  # beyond the cores they only wait, and some thousands crash torch's OpenMP
        require_int("threads", threads, high=usable_cores())
    try:
        import jaxtyping  # noqa: F401
        import jinja2  # noqa: F401
        import tokenizers  # noqa: F401
        import torch
    except ModuleNotFoundError as missing:
        raise SpecError(f"{missing.name} is not installed, and generating needs it; `pip install 'tandem-lm[model]'`") from None
    if threads is not None:
        torch.set_num_threads(threads)


def stored_weights(name: str, spec: ModelSpec) -> dict[str, Any] | None:
    """Weights that lie at this name, compared with the specification; None for a name or a lone config.json."""
    from tandem.model.shards import describe_weights
    from tandem.spec.catalog import find_weights

    try:
        path = find_weights(name)
    except SpecError:
        return None
    return describe_weights(path, spec)
