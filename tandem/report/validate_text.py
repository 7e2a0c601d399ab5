"""Tables of `tandem validate` for a terminal: one line a set of rows, both metrics side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.table import Table

from tandem.perf.peer import PeerAnswers
from tandem.perf.validate import ErrorSet, Predictions, measured
from tandem.report.text import ms, table

Pair = tuple[ErrorSet, ErrorSet]
OWN_COLUMNS = ("!rows", ">n", ">TPOT median", ">mean", ">!ratio", ">in 80 %", ">TTFT median", ">!ratio", ">in 80 %")
PEER_COLUMNS = (">peer answers", ">peer TPOT", ">Tandem there", ">peer TTFT", ">Tandem there")
SECTIONS = {
    "validation": "Predicted against measured, settings on which no coefficient was fitted",
    "calibration": "The rows that were fitted",
    "held out": "Coefficients refitted on calibration rows without the GPU or the model, judged on its validation rows",
    "held out, both sides": "The same, judged on all its rows",
    "labels": "What each evidence label is worth, on validation rows",
}
NOTES = ("median, mean: absolute percentage error; ratio: predicted / measured, median; in 80 %: inside the 80 % interval.",)


def pairs(sets: Iterable[ErrorSet]) -> list[Pair]:
    """TPOT and TTFT of each set of rows, in the order given."""
    found: dict[tuple[str, str], dict[str, ErrorSet]] = {}
    for s in sets:
        found.setdefault((s.side, s.name), {})[s.metric] = s
    return [(by["tpot_s"], by["ttft_s"]) for by in found.values()]


def section_of(s: ErrorSet) -> str:
    """Which of SECTIONS a set belongs to."""
    if s.name.startswith("leave-one-"):
        return "held out" if s.side == "validation" else "held out, both sides"
    return "labels" if s.name.startswith("label ") else s.side


def title_of(s: ErrorSet) -> str:
    """A set's name in words: `leave-one-gpu-out h100-sxm` is `without h100-sxm`."""
    what, found, part = s.name.partition("-out")
    if not found:
        return s.name.removeprefix("label ")
    left_out = part.removesuffix(" disaggregated").strip()
    title = f"without {left_out}" if left_out else f"each {what.removeprefix('leave-one-').replace('gpu', 'GPU')} left out"
    return f"{title}, disaggregated" if part.endswith(" disaggregated") else title


def shown(s: ErrorSet) -> bool:
    """Whether a terminal shows a set; the finest groups are in the report and in --json."""
    parts = s.name.count(" ")
    if section_of(s) == "validation":
        return parts <= 1
    return {"calibration": parts == 0, "held out, both sides": "-out " not in s.name}.get(section_of(s), True)


def cells(pair: Pair, with_peer: bool) -> list[str]:
    """One line of a table."""
    tpot, ttft = pair
    line = [title_of(tpot), f"{tpot.n:,}", _percent(tpot.median_ape), _percent(tpot.mean_ape), f"{tpot.ratio:.2f}"]
    line += [f"{tpot.coverage:.0%}", _percent(ttft.median_ape), f"{ttft.ratio:.2f}", f"{ttft.coverage:.0%}"]
    if with_peer:
        line += [f"{tpot.peer.share:.0%}" if tpot.peer else "-"]
        for peer in (tpot.peer, ttft.peer):
            line += [_percent(peer.median_ape if peer else None), _percent(peer.own_median_ape if peer else None)]
    return line


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def peer_table(sets: Sequence[ErrorSet], name: str) -> Table:
    """Another predictor beside Tandem on the validation rows that it answers."""
    t = table(
        f"{name} on the same rows; both columns of errors are of those that it answers",
        "!rows", ">n", ">answers", ">TPOT median", ">Tandem", ">mean", ">Tandem", ">!ratio",
        ">TTFT median", ">Tandem", ">!ratio",
    )  # fmt: skip
    for tpot, ttft in pairs(s for s in sets if s.peer and shown(s)):
        a, b = tpot.peer, ttft.peer
        if a is None or b is None or a.ratio is None or b.ratio is None:
            t.add_row(tpot.name, f"{tpot.n:,}", "0%")
            continue
        errors = (a.median_ape, a.own_median_ape, a.mean_ape, a.own_mean_ape)
        line = [*map(_percent, errors), f"{a.ratio:.2f}", _percent(b.median_ape), _percent(b.own_median_ape), f"{b.ratio:.2f}"]
        t.add_row(tpot.name, f"{tpot.n:,}", f"{a.share:.0%}", *line)
    return t


def tables(sets: Sequence[ErrorSet]) -> list[Table]:
    """A table for each section that has sets."""
    found = []
    for section, title in SECTIONS.items():
        chosen = [p for p in pairs(s for s in sets if section_of(s) == section) if shown(p[0])]
        if not chosen:
            continue
        t = table(title, *OWN_COLUMNS)
        for pair in chosen:
            t.add_row(*cells(pair, with_peer=False))
        found.append(t)
    return found


def rows_table(p: Predictions, limit: int = 30) -> Table:
    """A user's own rows one by one, those that err most in TPOT first."""
    error = np.abs(p.tpot_s / measured(p, "tpot_s") - 1.0)
    title = "Row by row" + (f", the {limit} that err most in TPOT" if len(p.rows) > limit else "")
    t = table(title, "row", ">TPOT measured", ">predicted (80 %)", ">error", ">TTFT measured", ">predicted (80 %)", "evidence")
    for i in np.argsort(-error)[:limit]:
        row = p.rows[i]
        line = [row.row_id]
        for metric in ("tpot_s", "ttft_s"):
            low, high = p.low[metric][i], p.high[metric][i]
            line += [ms(getattr(row, metric)), f"{ms(getattr(p, metric)[i])} ({ms(low)} to {ms(high)})"]
        t.add_row(*line[:3], f"{error[i]:.1%}", *line[3:], p.evidence[i])
    return t


def sentences(answered: dict[str, dict[str, float]], peer: PeerAnswers | None) -> list[str]:
    """What the tables leave unsaid: shares answered, and what the peer does not answer."""
    words = {"colocated": "co-located", "disaggregated": "disaggregated"}
    lines = [
        f"answered: {share['answered']:,.0f} of {share['usable']:,.0f} usable {words[mode]} rows ({share['share']:.0%})"
        for mode, share in answered.items()
    ]
    if peer is not None:
        lines += [
            f"{peer.name} {peer.version} answered {share['peer_answered']:,.0f} of {share['peer_asked']:,.0f} "
            f"{words[mode]} validation rows ({share['peer_share']:.0%})"
            for mode, share in answered.items()
        ]
        lines += [f"not answered, {count} rows: {why}" for why, count in list(peer.reasons.items())[:3]]
    return [*lines, *NOTES]
