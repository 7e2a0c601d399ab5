"""The figures of paper B as plain numbers from our sweeps, kernels only; a report draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tandem.study.paper_b_measures import MILLION_CUTOFF_S, Measures
from tandem.study.paper_b_space import (
    BALANCED_LONG,
    DYNAMIC,
    EXTREME_DECODE,
    MILLION,
    MODELS,
    PREFILL_HEAVY,
    R1_MIXES,
    SHORT_OUTPUT,
    PaperBSpace,
    lognormal,
    mix_name,
    trace_shaped,
)
from tandem.study.result import Figure, Panel, Series, Style
from tandem.study.sweep import Curve, Swept

INTERACTIVITY, THROUGHPUT = "interactivity, tok/s/user", "throughput, tok/s/GPU over all GPUs"
MAX_POINTS = 60
CUTOFFS_S = (1.0, 2.0, 5.0, 10.0)


def thin(count: int) -> NDArray[np.int64]:
    """At most MAX_POINTS evenly spaced indices with both ends."""
    return (
        np.unique(np.round(np.linspace(0, count - 1, min(count, MAX_POINTS))).astype(np.int64)) if count else np.zeros(0, int)
    )


def curve_series(
    swept: Swept,
    curve: Curve,
    name: str,
    *,
    role: str | None = None,
    style: Style = "line",
    scale: float = 1.0,
    start: float | None = None,
) -> Series:
    """A frontier with what each point is; `start` draws its highest point on to a lower interactivity."""
    rows = [int(i) for i in thin(len(curve))]
    texts = []
    for i in rows:
        ratio = ""
        if curve.ratio is not None:
            prefill, decode = swept.instances(curve, i)
            ratio = f", {curve.ratio[i]:.3g} prefill GPUs a decode GPU: {prefill} prefill to {decode} decode instances"
        kind = "decode " if curve.ratio is not None else ""
        texts.append(f"{kind}({swept.parallelism(curve, i)}) batch {swept.batch(curve, i)}{ratio}")
    x = [float(curve.tokens_per_s_per_user[i]) for i in rows]
    y = [float(curve.tokens_per_s_per_gpu[i]) / scale for i in rows]
    if start is not None and x and start < x[0]:
        x, y, texts = [start, *x], [y[0], *y], [texts[0], *texts]
    return Series(
        name=name,
        x=x,
        y=y,
        text=texts,
        role=role or curve.mode,
        style=style,
    )


def _dashed(swept: Swept, curve: Curve, name: str, role: str) -> Series:
    return curve_series(swept, curve, name, role=role, style="dash")


def modes(swept: Swept) -> tuple[Series, ...]:
    """The three ways to serve."""
    return (
        curve_series(swept, swept.shared(modes=["colocated"]), "co-located"),
        curve_series(swept, swept.shared(modes=["piggybacked"]), "piggybacked"),
        curve_series(swept, swept.split(), "disaggregated"),
    )


def _frontiers(title: str, note: str, panels: Sequence[tuple[str, Sequence[Series]]]) -> Figure:
    return Figure(
        title=title,
        note=note,
        x_title=INTERACTIVITY,
        y_title=THROUGHPUT,
        panels=tuple(Panel(title=name, series=tuple(series)) for name, series in panels),
    )


def _figure_2(space: PaperBSpace) -> Figure:
    swept = space.get("R1", PREFILL_HEAVY)
    cutoffs = tuple(
        curve_series(swept, swept.split(ttft_cutoff_s=c), f"split, TTFT <= {c:g} s", role=None if c == 10 else f"cutoff {c:g}")
        for c in CUTOFFS_S
    )
    return _frontiers(
        "The three modes, and one split curve for each TTFT cutoff",
        "Algorithm 1 picks one prefill instance for each cutoff; a tighter one takes a faster, less efficient instance.",
        [("DeepSeek-R1 16384/2048", (*modes(swept)[:2], *cutoffs))],
    )


def _figure_5(m: Measures) -> Figure:
    shown = [c for c in m.cpp if c in (512, 2048, 8192)]
    times = tuple(
        Series(name=f"chunks of {c:,}", x=[float(p.stages) for p in m.cpp[c]], y=[p.ttft_s for p in m.cpp[c]]) for c in shown
    )
    printed = Series(name="printed", x=[1.0, 32.0], y=[2**6.48, 2**1.55], style="markers", role="printed")
    rates = tuple(
        Series(
            name=f"chunks of {c:,}",
            x=[float(p.stages) for p in m.cpp[c]],
            y=[p.prompt_tokens_per_s_per_gpu / m.cpp[c][0].prompt_tokens_per_s_per_gpu for p in m.cpp[c]],
        )
        for c in shown
    )
    bounds = [Series(name="printed range", x=[1.0, 32.0], y=[y, y], style="dash", role="printed") for y in (0.99, 1.03)]
    return Figure(
        title="Chunked pipeline parallelism in prefill: R1, 256k tokens, 64 GPUs, EP x PP = 64",
        note="Time to first token in seconds, and throughput over that of PP 1 with the same chunks.",
        x_title="pipeline stages",
        y_title="seconds; share of PP 1",
        x_log=True,
        y_log=True,
        panels=(Panel(title="TTFT, s", series=(*times, printed)), Panel(title="throughput", series=(*rates, *bounds))),
    )


def _figure_6(space: PaperBSpace) -> Figure:
    panels: list[tuple[str, Sequence[Series]]] = []
    for model, title in (("R1", "DeepSeek-R1 16384/2048"), ("70B", "Llama-3.1-70B 16384/2048")):
        swept = space.get(model, PREFILL_HEAVY)
        small = space.chunk_curves(swept)
        series = [
            *modes(swept)[:2],
            _dashed(swept, small[min(small)], f"chunks of {min(small)}", "piggybacked"),
        ]
        if model == "R1":
            kept = space.get(model, PREFILL_HEAVY, cached_up=True)
            curves = space.chunk_curves(kept)
            series.append(_dashed(kept, curves[min(curves)], f"chunks of {min(curves)}, up-projection kept", "kept"))
        panels.append((title, tuple(series)))
    return _frontiers(
        "Piggybacking and the kind of attention",
        "Short chunks make latent attention project its cache up again and again; grouped queries read theirs as it is.",
        panels,
    )


def _figure_9(m: Measures) -> Figure:
    series = []
    for model in MODELS:
        split = m.space.get(model, PREFILL_HEAVY).split()
        assert split.ratio is not None
        rows = [int(i) for i in thin(len(split))]
        series.append(
            Series(
                name=model,
                x=[float(split.tokens_per_s_per_user[i]) for i in rows],
                y=[float(split.ratio[i]) for i in rows],
                role=model,
            )
        )
    low, high = m.common
    return Figure(
        title="Best context-to-generation GPU ratio, 16384/2048",
        note=f"All models reach {low:.0f} to {high:.0f} tok/s/user. Printed, low to high interactivity: R1 3.64 to 0.056, 405B "
        "2.07 to 0.20, 70B 0.94 to 0.45, 8B 0.33 to 0.43.",
        x_title=INTERACTIVITY,
        y_title="prefill GPUs for each decode GPU",
        y_log=True,
        panels=(Panel(title="", series=tuple(series)),),
    )


def _figure_10(m: Measures) -> Figure:
    swept = m.space.get("R1", PREFILL_HEAVY)
    split = swept.split()
    highest = float(split.tokens_per_s_per_gpu[0])
    fixed = [
        curve_series(
            swept,
            swept.fixed_ratio(r),
            f"fixed {r:.2f}",
            role=f"fixed {i}",
            style="dash" if i > 1 else "line",
            scale=highest,
            start=float(split.tokens_per_s_per_user[0]),
        )
        for i, r in enumerate(m.fixed)
    ]
    return Figure(
        title="Fixed ratios against re-matched pools: R1 16384/2048",
        note="Throughput over the highest. 3.50 and 0.50 are printed; dashed: at the same place relative to our own optimum.",
        x_title=INTERACTIVITY,
        y_title="share of the highest throughput",
        panels=(Panel(title="", series=(curve_series(swept, split, "re-matched", scale=highest), *fixed)),),
    )


def _figure_11(space: PaperBSpace) -> Figure:
    panels = []
    for model, title in (("R1", "DeepSeek-R1 16384/2048"), ("70B", "Llama-3.1-70B 16384/2048")):
        wide, narrow = space.get(model, PREFILL_HEAVY), space.get(model, PREFILL_HEAVY, domain_gpus=8)
        series = (
            curve_series(wide, wide.split(), "72 GPUs linked"),
            _dashed(narrow, narrow.split(), "8 GPUs linked", "narrow"),
        )
        panels.append((title, series))
    return _frontiers(
        "Scale-up domain of 72 against 8 GPUs, same GPU, disaggregated",
        "Both may use instances of up to 64 GPUs; beyond the domain collectives take the slower network.",
        panels,
    )


def _figure_12(space: PaperBSpace) -> Figure:
    panels = []
    cases = (("16384/2048", space.get("R1", PREFILL_HEAVY), 10.0), ("1048576/2048", space.get("R1", MILLION), MILLION_CUTOFF_S))
    for title, swept, cutoff in cases:
        split = swept.split(ttft_cutoff_s=cutoff)
        moved = swept.transfer(split)
        rows = [int(i) for i in thin(len(split))]
        x = [float(split.tokens_per_s_per_user[i]) for i in rows]
        sides = (("egress", moved.egress_bytes_per_s), ("ingress", moved.ingress_bytes_per_s))
        series = [Series(name=n, x=x, y=[float(v[i]) / 1e9 for i in rows], role=n) for n, v in sides]
        panels.append(Panel(title=title, series=tuple(series)))
    return Figure(
        title="Bandwidth that moving R1's cache takes",
        note="A GPU needs the larger of the two. Printed: 0.40 to 1.23 GB/s at 16k, 0.97 to 1.82 GB/s at 1M.",
        x_title=INTERACTIVITY,
        y_title="GB/s a GPU",
        panels=tuple(panels),
    )


def _figure_14(space: PaperBSpace) -> Figure:
    constant = space.get("70B", DYNAMIC)
    panels = []
    for title, traffic in (("trace-shaped", trace_shaped(*DYNAMIC)), ("lognormal 0.5", lognormal(*DYNAMIC, 0.5))):
        found = space.get("70B", traffic)
        means = space.get("70B", (round(traffic.mean_isl), round(traffic.mean_osl)))
        series = (
            curve_series(found, found.split(), "dynamic"),
            _dashed(constant, constant.split(), "constant P50", "P50"),
            _dashed(means, means.split(), "constant means", "means"),
        )
        panels.append((title, series))
    return _frontiers(
        "Constant against dynamic traffic: Llama-70B, P50 4096/512, disaggregated",
        "Trace-shaped: the Azure conversation trace scaled to these medians. Lognormal: 20,000 independent draws, seed 0.",
        panels,
    )


def _elastic(m: Measures) -> Figure:
    e = m.elastic
    x, texts = [float(i) for i in range(len(e.mixes))], [f"serving {b}" for b in e.mixes]
    series = [
        Series(name=f"sized for {a}", x=x, y=row, text=texts, role=f"mix {i}", style="markers")
        for i, (a, row) in enumerate(zip(e.mixes, e.kept, strict=True))
    ]
    return Figure(
        title="Pools sized for one traffic mix and fed another: R1 at 50 tok/s/user",
        note=f"Share of the re-matched throughput. The best single ratio, {e.best_mix_ratio:.2f}, keeps {e.best_mix_kept:.0%} "
        "on average.",
        x_title="mix served",
        x_labels=tuple(e.mixes),
        y_title="share of re-matched throughput",
        panels=(Panel(title="", series=tuple(series)),),
    )


def figures(m: Measures) -> dict[str, Figure]:
    """All of them, by the paper's number; `elastic` is ours."""
    space = m.space
    by_mix = [(f"R1 {mix_name(mix)}", modes(space.get("R1", mix))) for mix in R1_MIXES]
    return {
        "1": _frontiers(
            "When splitting helps: prefill-heavy against decode-heavy traffic",
            "The paper prints normalised curves; ours are absolute.",
            [(f"R1 {mix_name(mix)}", modes(space.get("R1", mix))) for mix in (PREFILL_HEAVY, EXTREME_DECODE)],
        ),
        "2": _figure_2(space),
        "5": _figure_5(m),
        "6": _figure_6(space),
        "7": _frontiers(
            "Model size: Llama-3.1 at 4096/256",
            "Splitting gains more the larger the model.",
            [(f"Llama-3.1-{k}", modes(space.get(k, SHORT_OUTPUT))) for k in ("8B", "70B", "405B")],
        ),
        "8": _frontiers(
            "Traffic mixes of R1",
            f"At equal ISL and OSL longer is not better for splitting: see {mix_name(BALANCED_LONG)} and claim T5.",
            by_mix,
        ),
        "9": _figure_9(m),
        "10": _figure_10(m),
        "11": _figure_11(space),
        "12": _figure_12(space),
        "14": _figure_14(space),
        "elastic": _elastic(m),
    }
