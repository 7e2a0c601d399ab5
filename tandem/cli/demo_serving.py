"""The end of the tour: a model served on this machine, asked through OpenAI's client, beside what was predicted for it."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.cli.served import served
from tandem.spec.design import Estimate
from tandem.spec.errors import Infeasible, SpecError, TandemError

MODEL = "smollm2-135m-instruct"
DTYPE = "float16"
TEXT = (
    "France lies in Western Europe, between the Atlantic and the Alps. Its longest river is the Loire, its highest mountain is "
    "Mont Blanc with 4,806 metres, its largest lake is Lake Geneva, which it shares with Switzerland. Its capital is Paris, on "
    "the Seine, with the Louvre, the Eiffel Tower and some two million people. Marseille is its oldest city and its largest "
    "port; Lyon lies where the Saone meets the Rhone; Bordeaux is known for its wine, Toulouse for its aircraft, Lille for its "
    "textiles. The country has some sixty-eight million people and shares borders with Belgium, Luxembourg, Germany, "
    "Switzerland, Italy, Monaco, Spain and Andorra. "
)
QUESTION = "What is the capital of France?"
ASKED = 3
"""Times, after one that warms up; of TTFT and TPOT the medians count."""
OUTPUT_TOKENS = 32
START_S = 120.0
SERVED = ("--dtype", DTYPE, "--cache-bytes", str(1 << 29), "--prefill", "1", "--decode", "1", "--max-context", "2048")


@dataclass(frozen=True)
class Served:
    """One question to a served model: seconds as its client saw them, and as they were predicted."""

    model: str
    random: bool
    """Whether the weights are random, for want of real ones."""
    question: str
    answer: str
    isl: int
    osl: int
    handoff_bytes: int
    """That went from the prefill worker to the decode worker, over all answers."""
    threads: int
    ttft_s: float
    tpot_s: float
    predicted_ttft_s: Estimate
    predicted_tpot_s: Estimate

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def serve_and_ask() -> Served | Infeasible:
    """Serve with one prefill and one decode worker, and ask. Infeasible where packages that this needs are not installed."""
    try:
        import openai  # noqa: F401
        import torch

        from tandem.serve import launch  # noqa: F401
    except ModuleNotFoundError as missing:
        return Infeasible(f"{missing.name} is not installed; `pip install 'tandem-lm[demo]'` serves a model here, too")
    from tandem.spec.catalog import find_weights, load_spec

    with tempfile.TemporaryDirectory() as folder:
        try:
            find_weights(MODEL)
            model, random = MODEL, False
        except TandemError:
            model, random = random_model(Path(folder) / "random-hybrid"), True
        with served(model, SERVED) as ready:
            seen = [_ask(ready, number) for number in range(1 + ASKED)][1:]
            handoff_bytes = _metric(ready["url"], "tandem_handoff_bytes_total")
        threads = torch.get_num_threads()
        torch.set_num_threads(ready["threads"])
        try:
            predicted = _predicted(load_spec(find_weights(model)), seen[0].isl, seen[0].osl)
        finally:
            torch.set_num_threads(threads)
    return Served(
        model="a random hybrid of 1 M parameters" if random else "SmolLM2-135M-Instruct",
        random=random,
        question=f"(some 180 tokens about France) {QUESTION}",
        answer=seen[0].answer,
        isl=seen[0].isl,
        osl=seen[0].osl,
        handoff_bytes=int(handoff_bytes),
        threads=ready["threads"],
        ttft_s=statistics.median(s.ttft_s for s in seen),
        tpot_s=statistics.median(s.tpot_s for s in seen),
        predicted_ttft_s=predicted[0],
        predicted_tpot_s=predicted[1],
    )


@dataclass(frozen=True)
class _Seen:
    answer: str
    isl: int
    osl: int
    ttft_s: float
    tpot_s: float


def _ask(ready: dict[str, Any], number: int) -> _Seen:
    """One question, streamed. Each begins in its own way, so that no prefix cache answers for the prefill."""
    from openai import OpenAI

    client = OpenAI(base_url=ready["url"] + "/v1", api_key="none", timeout=START_S, max_retries=0)
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=ready["model"],
        messages=[{"role": "user", "content": f"Text {number}. {TEXT}{QUESTION}"}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_completion_tokens=OUTPUT_TOKENS,
    )
    pieces: list[str] = []
    times: list[float] = []
    isl = osl = 0
    for chunk in stream:
        if chunk.usage is not None:
            isl, osl = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            pieces.append(chunk.choices[0].delta.content)
    if not times:
        raise SpecError("the server answered with no text; see `tandem serve`")
    tpot = (times[-1] - times[0]) / max(1, len(times) - 1)
    return _Seen("".join(pieces), isl, osl, times[0] - started, tpot)


def _metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name} (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else 0.0


def _predicted(spec: Any, isl: int, osl: int) -> tuple[Estimate, Estimate]:
    """TTFT and TPOT of one request at a time, by the performance model, for this machine as a quick look at it shows it."""
    import torch

    from tandem.engine.host import host_precision, measure_host
    from tandem.perf.estimate import estimate

    weights = getattr(torch, DTYPE)
    p = host_precision(weights)
    found = estimate(
        model=spec,
        hardware=measure_host(weights),
        isl=isl,
        osl=max(osl, 2),
        concurrency=1,
        precision=f"{p.weights}/{p.activations}/{p.kv}",
        backend="tandem",
    )
    return found.ttft_s, found.tpot_s


def random_model(folder: Path) -> str:
    """A hybrid of some 1 M random parameters with a tokenizer of bytes, saved where a server can load it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tandem.model.hybrid import Decoder, TokenIds
    from tandem.model.load import save_model
    from tandem.spec.mixers import MLP, Attention, Mamba2
    from tandem.spec.model import ModelSpec

    mamba = Mamba2(num_heads=8, head_dim=32, state_dim=32, groups=2, conv_kernel=4, conv_bias=True, proj_bias=False)
    attention, mlp = Attention(num_heads=4, num_kv_heads=2, head_dim=32), MLP(ffn_size=384, gated=False)
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spec = ModelSpec(
        name="random-hybrid",
        vocab_size=len(symbols),
        hidden_size=128,
        layers=(mamba, mlp, attention, mlp, mamba, mlp, mamba, mlp),
        max_context=4096,
    )
    save_model(Decoder(spec, token_ids=TokenIds(bos=1, eos=(2,), pad=0)), folder)
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)
