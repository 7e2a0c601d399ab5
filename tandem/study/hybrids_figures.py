"""The figures of the study of hybrids as plain numbers, kernels only."""

from __future__ import annotations

from tandem.study.hybrids_cells import Decision, flips_of
from tandem.study.hybrids_measures import HybridMeasures
from tandem.study.hybrids_space import DECODE_HEAVY, PAIRS, PREFILL_HEAVY, TPOTS_S, Pair
from tandem.study.hybrids_why import name_of
from tandem.study.paper_b_figures import INTERACTIVITY, THROUGHPUT, curve_series, thin
from tandem.study.result import Figure, Panel, Series
from tandem.study.sweep import Swept

MODES = {"colocated": "co-located", "piggybacked": "piggybacked"}
BYTES_ISL = [2**i for i in range(7, 18)]
ANSWERS = ("both", "hybrid only", "Transformer only", "neither")


def _title(pair: Pair) -> str:
    return f"{name_of(pair.hybrid)} and {name_of(pair.transformer)}"


def _frontier(m: HybridMeasures, pair: Pair) -> Figure:
    panels = []
    for mix in (PREFILL_HEAVY, DECODE_HEAVY):
        series = []
        for model, who, style in ((pair.hybrid, "hybrid", "line"), (pair.transformer, "Transformer", "dash")):
            swept = m.space.get(model, mix)
            curves = {name: swept.shared(modes=[mode]) for mode, name in MODES.items()} | {"disaggregated": swept.split()}
            series += [
                curve_series(swept, c, f"{name}, {who}", role=c.mode, style="dash" if style == "dash" else "line")
                for name, c in curves.items()
            ]
        panels.append(Panel(title=f"{mix[0]}/{mix[1]}", series=tuple(series)))
    return Figure(
        title=f"{_title(pair)}: three ways to serve",
        note="Solid: the hybrid; dashed: the Transformer of its size. H100, BF16, instances inside one node of 8 GPUs.",
        x_title=INTERACTIVITY,
        y_title=THROUGHPUT,
        panels=tuple(panels),
        y_log=True,
    )


def _ratio_series(swept: Swept, name: str, role: str) -> Series:
    split = swept.split()
    assert split.ratio is not None
    rows = [int(i) for i in thin(len(split))]
    x = [float(split.tokens_per_s_per_user[i]) for i in rows]
    return Series(name=name, x=x, y=[float(split.ratio[i]) for i in rows], role=role)


def _need_series(swept: Swept, name: str, role: str) -> Series:
    split = swept.split()
    need = swept.transfer(split).need_bytes_per_s
    rows = [int(i) for i in thin(len(split))]
    x = [float(split.tokens_per_s_per_user[i]) for i in rows]
    return Series(name=name, x=x, y=[float(need[i]) / 1e9 for i in rows], role=role)


def _two(m: HybridMeasures, draw: object, pair: Pair) -> tuple[Series, ...]:
    assert callable(draw)
    sides = ((pair.hybrid, "hybrid"), (pair.transformer, "Transformer"))
    return tuple(draw(m.space.get(model, PREFILL_HEAVY), who, who) for model, who in sides)


def _bytes(m: HybridMeasures, pair: Pair) -> tuple[Series, ...]:
    x = [float(i) for i in BYTES_ISL]
    series = [
        Series(name=who, x=x, y=[m.states[model].at(i) / 1e6 for i in x], role=who)
        for model, who in ((pair.hybrid, "hybrid"), (pair.transformer, "Transformer"))
    ]
    cross = next(m.crossings[n] for n, p in PAIRS.items() if p is pair).transfer_tokens
    at = Series(name="equal", x=[cross], y=[m.states[pair.hybrid].at(cross) / 1e6], style="markers", role="printed")
    return (*series, at)


def _told(cell: Decision) -> str:
    return f"{cell.gain:.2f}" if cell.gain is not None else "only split"


def _map(m: HybridMeasures, pair: Pair, tpot_s: float) -> tuple[Series, ...]:
    hybrid, transformer = m.cells[pair.hybrid], m.cells[pair.transformer]
    flips = flips_of(hybrid, transformer)
    lists = (flips.both, flips.hybrid, flips.transformer, flips.neither)
    series = []
    for answer, keys in zip(ANSWERS, lists, strict=True):
        here = [k for k in keys if k[2] == tpot_s]
        texts = [f"ISL {k[0]}, OSL {k[1]}: gain {_told(hybrid[k])}, Transformer {_told(transformer[k])}" for k in here]
        series.append(
            Series(name=answer, x=[float(k[0]) for k in here], y=[float(k[1]) for k in here], text=texts, style="markers",
                   role=answer)
        )  # fmt: skip
    return tuple(series)


def _gain(m: HybridMeasures, pair: Pair, isl: int) -> tuple[Series, ...]:
    series = []
    for tpot_s in TPOTS_S:
        for model, who in ((pair.hybrid, "hybrid"), (pair.transformer, "Transformer")):
            cells = {k[1]: c for k, c in m.cells[model].items() if (k[0], k[2]) == (isl, tpot_s) and c.gain is not None}
            series.append(
                Series(name=f"{who}, {tpot_s * 1e3:.0f} ms", x=[float(o) for o in cells],
                       y=[c.gain or 0.0 for c in cells.values()], role=f"{tpot_s}",
                       style="dash" if who == "Transformer" else "line")
            )  # fmt: skip
    return tuple(series)


def figures(m: HybridMeasures) -> dict[str, Figure]:
    """All of them by name."""
    found = {f"frontier {name}": _frontier(m, pair) for name, pair in PAIRS.items()}
    found["ratio"] = Figure(
        title="Best prefill GPUs for each decode GPU, 8192/1024",
        note="The hybrid's decode is cheap, so more of its GPUs prefill.",
        x_title=INTERACTIVITY,
        y_title="prefill GPUs a decode GPU",
        y_log=True,
        panels=tuple(Panel(title=_title(p), series=_two(m, _ratio_series, p)) for p in PAIRS.values()),
    )
    found["bytes"] = Figure(
        title="State that a request hands over",
        note="s0 + k * isl, state in fp32, cache in bf16; the mark is where both move the same.",
        x_title="prompt, tokens",
        y_title="MB a request",
        x_log=True,
        y_log=True,
        panels=tuple(Panel(title=_title(p), series=_bytes(m, p)) for p in PAIRS.values()),
    )
    found["need"] = Figure(
        title="Bandwidth that moving state takes, 8192/1024",
        note="The larger of what a prefill GPU sends and a decode GPU receives (paper B, Equations 1 and 2 with s0 + k * isl).",
        x_title=INTERACTIVITY,
        y_title="GB/s a GPU",
        panels=tuple(Panel(title=_title(p), series=_two(m, _need_series, p)) for p in PAIRS.values()),
    )
    isl = 8192 if 8192 in m.space.isls else m.space.isls[-1]
    found["gain"] = Figure(
        title=f"What splitting gains over output length, prompts of {isl:,} tokens",
        note="Solid: the hybrid; dashed: its Transformer; one colour for each TPOT bound. Worth it from 1.05 on.",
        x_title="output, tokens",
        y_title="split over best shared",
        x_log=True,
        panels=tuple(Panel(title=_title(p), series=_gain(m, p, isl)) for p in PAIRS.values()),
    )
    for tpot_s in TPOTS_S:
        found[f"map {tpot_s * 1e3:.0f} ms"] = Figure(
            title=f"For which traffic is splitting worth 1.05? TPOT <= {tpot_s * 1e3:.0f} ms",
            note="Each mark is a traffic; its colour says for which of the two models splitting is worth it.",
            x_title="prompt, tokens",
            y_title="output, tokens",
            x_log=True,
            y_log=True,
            panels=tuple(Panel(title=_title(p), series=_map(m, p, tpot_s)) for p in PAIRS.values()),
        )
    return found
