"""Tables and sentences for people, on a terminal. Milliseconds, GiB and tok/s appear here and in `html`, nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tandem.perf.estimate import EstimateResult
from tandem.plan.option import Option
from tandem.plan.planner import Plan
from tandem.spec.design import Deployment, Estimate
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec

MODE_TITLES = {"colocated": "co-located", "piggybacked": "co-located, piggybacked", "disaggregated": "disaggregated"}
EVIDENCE_TEXT = {
    "calibrated": "measured kernels of this GPU and measured serving rows of this backend",
    "transferred": "efficiencies borrowed from the nearest measured GPU, model family or backend",
    "roofline": "no measurement of this backend: kernels back to back, a factor of two either way",
}


def gib(value: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{value / 2**30:,.2f} GiB"


def ms(seconds: float) -> str:
    """Seconds as milliseconds, or as seconds from one on."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def bandwidth(bytes_per_s: float) -> str:
    """Bytes a second as GB/s."""
    return f"{bytes_per_s / 1e9:,.2f} GB/s"


def parameters(count: int) -> str:
    """A number of parameters in billions, or in millions below a tenth of one."""
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def span(e: Estimate, unit: str = "") -> str:
    """A rate with its interval."""
    digits = 0 if e.value >= 100 else 1
    return f"{e.value:,.{digits}f} ({e.low:,.{digits}f} to {e.high:,.{digits}f}){unit}"


def span_ms(e: Estimate) -> str:
    """A time with its interval."""
    return f"{ms(e.value)} ({ms(e.low)} to {ms(e.high)})"


def table(title: str, *columns: str) -> Table:
    """An empty table; marks before a column's name: > aligns it right, ! never breaks it over lines."""
    t = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        title_text = name.lstrip(">!")
        marks = name[: len(name) - len(title_text)]
        t.add_column(title_text, justify="right" if ">" in marks else "left", no_wrap="!" in marks, overflow="fold")
    return t


def console() -> Console:
    """Standard output; 120 columns where it is not a terminal, so that logs read well."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def progress_console() -> Console:
    """Standard error, where progress goes, so that standard output stays clean."""
    return Console(stderr=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A bar on standard error with what is being done and for how long; gone when done, silent where no terminal is."""
    out = progress_console()
    if not out.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what: bar.update(task, description=f"{title}: {what}")


def short(name: str) -> str:
    """A model's name without its organisation."""
    return name.rpartition("/")[2]


_SHORT = {"multi-token prediction": "MTP", "vision encoder": "vision"}


def models_table(specs: list[ModelSpec]) -> Table:
    """One line a model."""
    t = table(
        "Models (mixers: layers of one mixer each, two to a transformer block; KV: bytes of a token in bf16; "
        "state: constant MiB of a sequence)",
        "!name", "!family", ">!mixers", ">!weights", ">!active", ">!KV", ">!state", "!not counted",
    )  # fmt: skip
    for s in specs:
        t.add_row(
            short(s.name), s.family, str(len(s.layers)), parameters(s.parameters), parameters(s.active_parameters),
            f"{s.kv_bytes_per_token():,}", f"{s.state_bytes_per_sequence() / 2**20:,.1f}",
            ", ".join(_SHORT.get(part, part) for part in s.omitted),
        )  # fmt: skip
    return t


def hardware_table(specs: list[HardwareSpec]) -> Table:
    """One line a GPU."""
    t = table(
        "GPUs (memory in GiB and TB/s; dense peaks in TFLOP/s; links in GB/s a GPU and direction; kernels: whose timings)",
        "!name", ">GiB", ">TB/s", ">bf16", ">fp8", ">fp4", ">GPUs linked", ">link", ">network", ">USD/h", "!kernels",
    )  # fmt: skip
    for s in specs:
        peaks = [f"{s.peak_flops[d] / 1e12:,.0f}" if d in s.peak_flops else "-" for d in ("bf16", "fp8", "fp4")]
        t.add_row(
            s.name, f"{s.memory_bytes / 2**30:.1f}", f"{s.memory_bytes_per_s / 1e12:.2f}", *peaks, str(s.scale_up_gpus),
            f"{s.scale_up_bytes_per_s / 1e9:,.0f}", f"{s.scale_out_bytes_per_s / 1e9:,.1f}", f"{s.price_per_hour_usd:.2f}",
            "own" if s.fits_from == s.name else s.fits_from,
        )  # fmt: skip
    return t


def inspect_table(spec: ModelSpec, data: dict[str, Any]) -> Table:
    """Memory and make-up of one model."""
    t = table(f"{spec.name} at {data['context']:,} tokens x batch {data['batch']}, {data['dtype']}", "!what", "value")
    t.add_row("parameters", f"{data['parameters']:,}")
    t.add_row("active parameters a token", f"{data['active_parameters']:,}")
    t.add_row("layers", ", ".join(f"{n['count']} {kind}" for kind, n in data["layers"].items()))
    t.add_row("weights", gib(data["weight_bytes"]))
    t.add_row("attention cache", f"{gib(data['kv_bytes'])}  ({data['kv_bytes_per_token']:,} B a token)")
    t.add_row("recurrent state", f"{gib(data['state_bytes'])}  ({data['state_bytes_per_sequence']:,} B a sequence)")
    t.add_row("total", gib(data["total_bytes"]))
    if data["context"] > spec.max_context:
        t.add_row("note", f"published for at most {spec.max_context:,} tokens")
    if spec.omitted:
        t.add_row("not counted", ", ".join(spec.omitted))
    if data.get("stored"):
        t.add_row("stored", _stored(data["stored"]))
    return t


def _stored(stored: dict[str, Any]) -> str:
    """What a checkpoint's files hold."""
    formats = ", ".join(f"{form} {gib(size)}" for form, size in stored["formats"].items())
    fit = "names and shapes are the model's" if stored["checked"] else "names are not known here"
    return f"{stored['tensors']:,} tensors in {stored['files']} file{'s'[: stored['files'] != 1]}: {formats}; {fit}"


def estimate_table(title: str, e: EstimateResult) -> Table:
    """The predictions of one case."""
    t = table(title, "!what", "value (80 % interval)")
    t.add_row("TTFT with queueing", span_ms(e.ttft_s))
    t.add_row("TPOT", span_ms(e.tpot_s))
    t.add_row("interactivity", span(e.tokens_per_s_per_user, " tok/s/user"))
    t.add_row("throughput", span(e.tokens_per_s_per_gpu, " tok/s/GPU"))
    t.add_row("batch of an instance", f"{e.batch:,} of at most {e.max_batch:,}")
    if e.waiting:
        t.add_row("waiting for a place", f"{e.waiting:,} requests; TTFT includes their wait")
    m = e.memory
    held = m["weight_bytes"] + m["kv_bytes"] + m["state_bytes"] + m["workspace_bytes"]
    t.add_row("memory at that batch, fullest GPU", f"{gib(held)} of {gib(m['usable_bytes'])} usable")
    t.add_row("evidence", f"{e.evidence}: {EVIDENCE_TEXT[e.evidence]}")
    return t


def describe(d: Deployment) -> str:
    """A deployment in one line."""
    return "; ".join(
        f"{p.replicas} x {'' if p.role == 'colocated' else p.role + ' '}({p.parallelism}) batch {p.batch}"
        + (f" chunk {p.chunk_tokens:,}" if p.chunk_tokens else "")
        for p in d.pools
    )


def plan_table(plan: Plan) -> Table:
    """The best deployment of each mode, side by side."""
    w, slo = plan.workload, plan.slo
    bounds = ", ".join(
        f"{label} <= {ms(value)}" for label, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)) if value is not None
    )
    title = (
        f"{plan.model.name} on {plan.gpus} x {plan.hardware.title}, {w.name + ': ' if len(w.isl) > 1 else ''}"
        f"ISL {w.mean_isl:,.0f}, OSL {w.mean_osl:,.0f}{' on average' if len(w.isl) > 1 else ''}; {bounds or 'no latency bound'}"
    )
    t = table(title, "", "deployment", ">GPUs", ">!tok/s", ">!tok/s/GPU (80 %)", ">tok/s/user", ">!TTFT", ">!TPOT")
    for mode, o in plan.options.items():
        mark = "->" if o is plan.best else ""
        t.add_row(
            f"{mark} {MODE_TITLES[mode]}", describe(o.deployment), str(o.deployment.gpus), f"{o.tokens_per_s:,.0f}",
            span(o.tokens_per_s_per_gpu), f"{o.tokens_per_s_per_user.value:,.0f}", ms(o.ttft_s.value), ms(o.tpot_s.value),
        )  # fmt: skip
    return t


def plan_sentences(plan: Plan) -> list[str]:
    """Why the recommended deployment won, what limits it, and how sure that is."""
    best = plan.best
    lines = [_why(plan)]
    pools = {"colocated": "every instance", "prefill": "prefill pool", "decode": "decode pool"}
    lines += [f"{pools[role]}: bound by {what}" for role, what in best.binds.items()]
    if best.transfer is not None:
        lines.append(_transfer(best))
    if best.imbalance > 0.03:
        lines.append(
            f"no whole numbers of instances balance within 3 % in {plan.gpus} GPUs: the faster pool idles {best.imbalance:.0%}"
        )
    if plan.workload.requests_per_s is not None:
        load = plan.workload.requests_per_s
        needed = best.gpus_for(load)
        lines.append(
            f"this deployment carries {best.requests_per_s:,.0f} requests/s; the trace brings {load:,.2f} on average, "
            f"for which {needed} GPU{'s' * (needed > 1)} with the same instances would do"
        )
    evidence = best.tpot_s.evidence
    lines.append(f"evidence: {evidence}, {EVIDENCE_TEXT[evidence]}; the interval holds 80 % of measured rows of its kind")
    lines += plan.notes
    lines.append(f"{plan.points_evaluated:,} design points in {plan.seconds:.2f} s")
    return lines


def _why(plan: Plan) -> str:
    title = MODE_TITLES[plan.best.deployment.mode]
    if plan.gain is None:
        return f"recommended: {title}; no other kind of deployment meets the request"
    if plan.best is plan.disaggregated:
        return (
            f"recommended: {title}, {plan.gain:.2f} times the throughput of the best co-located deployment; it stays ahead "
            f"while it reaches {1 / plan.gain:.0%} of its rate-matched value, and real systems reach 75 to 100 %"
        )
    if plan.gain > 1:
        return f"recommended: {title}; disaggregated would be {plan.gain:.2f} times as fast, too little to tell or to split for"
    return f"recommended: {title}, {1 / plan.gain:.2f} times the throughput of the best disaggregated deployment"


def _transfer(option: Option) -> str:
    t = option.transfer or {}
    need = max(t["egress_bytes_per_s_per_gpu"], t["ingress_bytes_per_s_per_gpu"])
    return (
        f"state transfer: {t['bytes_per_request'] / 2**20:,.0f} MiB a request "
        f"({t['state_bytes_per_request'] / 2**20:,.1f} MiB + {t['kv_bytes_per_token'] / 2**10:,.1f} KiB a token"
        f"{', less beyond attention windows' if t['windowed'] else ''}), "
        f"{bandwidth(need)} a GPU needed of {bandwidth(t['link_bytes_per_s_per_gpu'])}; {ms(t['exposed_s'])} not hidden"
    )


def change_label(change: str) -> str:
    """A changed bound or budget in words: `tpot_s=0.015` is TPOT <= 15.0 ms, `gpus=16` is 16 GPUs."""
    field, _, value = change.partition("=")
    if field == "gpus":
        return f"{value} GPUs"
    return f"{field.removesuffix('_s').upper()} <= {ms(float(value))}"


def change_sentences(plan: Plan) -> list[str]:
    """What other bounds or budgets would recommend."""
    lines = []
    for c in plan.changes:
        label = change_label(c["change"])
        if c["recommended"] is None:
            lines.append(f"with {label}: nothing meets it")
            continue
        same = "still" if c["recommended"] == plan.best.deployment.mode else "then"
        gain = "" if c["gain"] is None else f", disaggregated / co-located {c['gain']:.2f}"
        lines.append(f"with {label}: {same} {MODE_TITLES[c['recommended']]}, {c['tokens_per_s']:,.0f} tok/s{gain}")
    return lines
