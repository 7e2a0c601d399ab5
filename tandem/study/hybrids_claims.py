"""What the study of hybrids asks, beside what papers A and B print where they print anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tandem.study import hybrids_why as why
from tandem.study.hybrids_cells import PROVEN, WORTH, Flips, flips_of
from tandem.study.hybrids_measures import HybridMeasures, Side, Variants, advantage_of, firm_flips
from tandem.study.hybrids_space import DECODE_HEAVY, ENGINE, JUDGE, PAIRS, PREFILL_HEAVY
from tandem.study.result import Claim

STEADY = 0.9
"""Share of decisions or of cells that must stay for a claim of robustness."""
LONG_ISL, SHORT_ISL = 8192, 512


class Verdict(NamedTuple):
    """Whether it holds, our numbers in words, and the numbers."""

    holds: bool
    text: str
    values: dict[str, Any]


def both_sides(m: HybridMeasures, mix: tuple[int, int] = PREFILL_HEAVY) -> dict[str, tuple[Side, Side]]:
    """Pair -> (hybrid, Transformer) at a mix."""
    return {n: (m.sides[p.hybrid, mix], m.sides[p.transformer, mix]) for n, p in PAIRS.items()}


def against(pairs: dict[str, tuple[float, float]], digits: int = 2) -> str:
    """`9B 1.65 to 1.37, ...`: hybrid first."""
    return ", ".join(f"{n} {a:.{digits}f} to {b:.{digits}f}" for n, (a, b) in pairs.items())


def _h1(m: HybridMeasures) -> Verdict:
    medians = {n: float(np.median(a)) for n, a in m.advantage.items()}
    more = {n: float(np.mean(np.array(a) > 1)) for n, a in m.advantage.items()}
    text = "median of all cells " + ", ".join(f"{n} {v:.2f} ({more[n]:.0%} above 1)" for n, v in medians.items())
    return Verdict(all(v > 1 for v in medians.values()), text, {"median": medians, "share above 1": more})


def _h2(m: HybridMeasures) -> Verdict:
    gains = {n: (h.gain, t.gain) for n, (h, t) in both_sides(m).items()}
    return Verdict(all(h > t for h, t in gains.values()), "area gain, hybrid to Transformer: " + against(gains), gains)


def _h3(m: HybridMeasures) -> Verdict:
    ratios = {n: (h.ratio_relaxed, t.ratio_relaxed) for n, (h, t) in both_sides(m).items()}
    text = "prefill GPUs a decode GPU, relaxed end: " + against(ratios)
    return Verdict(all(h > t for h, t in ratios.values()), text, ratios)


def _h4(m: HybridMeasures) -> Verdict:
    spans = {n: (e.hybrid[0] / e.hybrid[1], e.transformer[0] / e.transformer[1]) for n, e in m.ends.items()}
    text = "times that the ratio falls over the common range: " + against(spans, 0)
    return Verdict(all(h < t for h, t in spans.values()), text, {n: e._asdict() for n, e in m.ends.items()})


def _h5(m: HybridMeasures) -> Verdict:
    needs = {n: (h.need_high / 1e9, t.need_high / 1e9) for n, (h, t) in both_sides(m).items()}
    link = m.space.get(PAIRS["9B"].hybrid, PREFILL_HEAVY).sweep.hardware.scale_out_bytes_per_s
    worst = max(s.need_high for s in m.sides.values())
    holds = all(h < t for h, t in needs.values()) and worst < link
    short = {n: (h.need_high / 1e9, t.need_high / 1e9) for n, (h, t) in both_sides(m, DECODE_HEAVY).items()}
    text = f"highest need, GB/s a GPU: 8192/1024 {against(needs)}; 1024/8192 {against(short)}; link {link / 1e9:.0f}"
    return Verdict(holds, text, {"8192/1024": needs, "1024/8192": short, "link_bytes_per_s": link})


def _h6(m: HybridMeasures) -> Verdict:
    rows = {
        n: [(m.states[p.hybrid].at(i), m.states[p.transformer].at(i)) for i in (SHORT_ISL, LONG_ISL)] for n, p in PAIRS.items()
    }
    holds = all(short[0] > short[1] and long[0] < long[1] for short, long in rows.values())
    text = "crossing at " + ", ".join(f"{n} {c.transfer_tokens:,.0f}" for n, c in m.crossings.items()) + " tokens; at 8,192 "
    text += ", ".join(f"{n} {a / 1e6:,.0f} to {b / 1e6:,.0f} MB" for n, (_, (a, b)) in rows.items())
    return Verdict(holds, text, {n: c._asdict() | {"bytes": rows[n]} for n, c in m.crossings.items()})


def _rows(m: HybridMeasures, keep: Callable[[int], bool], sign: float) -> tuple[int, int, list[str], dict[str, Any]]:
    """Rows of ISL and bound in which the break-even OSL is (sign 1) not shorter for the hybrid, or (-1) not for the other."""
    good, total, broken, values = 0, 0, [], {}
    for name, rows in m.even.items():
        for (isl, tpot_s), (h, t) in rows.items():
            if not keep(isl):
                continue
            right = sign * (h.osl - t.osl) >= 0
            good, total = good + right, total + 1
            label = f"{name}, {isl} at {tpot_s * 1e3:.0f} ms"
            values[label] = {"hybrid": h._asdict(), "transformer": t._asdict()}
            if not right:
                broken.append(f"{label}: {h} to {t}")
    return good, total, broken, values


def _h7(m: HybridMeasures) -> Verdict:
    good, total, broken, values = _rows(m, lambda isl: isl >= LONG_ISL, 1.0)
    shown = [
        f"{n} {m.even[n][LONG_ISL, 0.02][0]} to {m.even[n][LONG_ISL, 0.02][1]}" for n in PAIRS if (LONG_ISL, 0.02) in m.even[n]
    ]
    text = f"longer or equal in {good} of {total} rows; tokens at 8192 and 20 ms: " + ", ".join(shown)
    return Verdict(good == total, text + (f"; not {'; '.join(broken)}" if broken else ""), values)


def _h8(m: HybridMeasures) -> Verdict:
    good, total, broken, values = _rows(m, lambda isl: isl == SHORT_ISL, -1.0)
    shown = [f"{n} {m.even[n][SHORT_ISL, 0.02][0]} to {m.even[n][SHORT_ISL, 0.02][1]}" for n in PAIRS]
    text = f"shorter or equal in {good} of {total} rows; tokens at 512 and 20 ms: " + ", ".join(shown)
    return Verdict(good == total, text + (f"; not {'; '.join(broken)}" if broken else ""), values)


def _h10(m: HybridMeasures) -> Verdict:
    law = m.law
    text = (
        f"decides alike in {law.agree:.0%} of {law.cells} cells, {law.agree_clear:.0%} of those further than 3 % from the "
        f"threshold; gain off by {law.error:.1%} (median), {law.bias:+.1%}"
    )
    return Verdict(law.agree_clear >= STEADY, text, law._asdict())


def _h11(m: HybridMeasures) -> Verdict:
    shares = {n: m.sides[p.hybrid, PREFILL_HEAVY].piggyback for n, p in PAIRS.items()}
    text = "piggybacked area over plain: " + ", ".join(f"{n} {v:.2f}" for n, v in shares.items())
    return Verdict(min(shares.values()) >= STEADY, text, shares)


def _h12(m: HybridMeasures) -> Verdict:
    gains = {n: m.sides[PAIRS[n].hybrid, PREFILL_HEAVY].gain for n in ("9B", "12B", "56B")}
    theirs = {n: m.sides[PAIRS[n].transformer, PREFILL_HEAVY].gain for n in gains}
    text = "hybrids " + ", ".join(f"{n} {v:.2f}" for n, v in gains.items())
    text += "; Transformers " + ", ".join(f"{v:.2f}" for v in theirs.values())
    rising = list(gains.values())
    return Verdict(rising == sorted(rising) and rising[-1] > rising[0], text, {"hybrids": gains, "transformers": theirs})


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question with what is printed about it, and the function that judges it."""

    id: str
    title: str
    printed: str | None
    source: str
    judge: Callable[[HybridMeasures], Verdict]
    why: Callable[[HybridMeasures], str]

    def claim(self, judging: HybridMeasures, engine: HybridMeasures | None) -> Claim:
        """As judged by kernels only, with the engine's verdict beside it."""
        verdicts = {JUDGE: self.judge(judging)} | ({ENGINE: self.judge(engine)} if engine is not None else {})
        texts = {name: v.text for name, v in verdicts.items()}
        return Claim(
            id=self.id, title=self.title, printed=self.printed, ours="; ".join(f"{n}: {t}" for n, t in texts.items()),
            ours_by=texts, holds=verdicts[JUDGE].holds, holds_engine=verdicts[ENGINE].holds if engine is not None else None,
            why=self.why(judging), source=self.source, values={n: v.values for n, v in verdicts.items()},
        )  # fmt: skip


OURS = "ours: nobody has printed it"
CHECKS = (
    Check(id="H1", title="At equal TPOT the hybrid serves more, each deployed at its best", judge=_h1, why=why.advantage,
          printed="up to 6.3 times Qwen3-8B (8k/16k, one A10G)", source="paper A, Nano-9B-v2; ours over the grid"),
    Check(id="H2", title="Splitting gains the hybrid more, 8192/1024", printed=None, source=OURS, judge=_h2, why=why.shares),
    Check(id="H3", title="The hybrid needs more prefill GPUs for each decode GPU", printed=None, source=OURS, judge=_h3,
          why=why.shares),
    Check(id="H4", title="Over the speeds that both reach its best ratio moves less", judge=_h4, why=why.spans,
          printed="65 times for R1, hardly for 8B", source="paper B, Figure 9, for Transformers"),
    Check(id="H5", title="It needs less transfer bandwidth at 8192/1024, and no link is short", judge=_h5, why=why.transfer,
          printed="0.4 to 1.8 GB/s a GPU, not a bottleneck (R1)", source="paper B, Figure 12; ours with s0 + k * isl"),
    Check(id="H6", title="It moves fewer bytes at 8,192 tokens and more at 512", printed=None, source=OURS, judge=_h6,
          why=why.crossing),
    Check(id="H7", title="From 8k prompts on splitting stays worth it to longer outputs", printed=None, source=OURS, judge=_h7,
          why=why.long_prompts),
    Check(id="H8", title="With 512-token prompts it stops being worth it sooner", printed=None, source=OURS, judge=_h8,
          why=why.short_prompts),
    Check(id="H10", title="Four GPU times decide: the closed form agrees with the search", printed=None, source=OURS,
          judge=_h10, why=why.law),
    Check(id="H11", title="Piggybacking suits hybrids", judge=_h11, why=why.piggyback,
          printed="close to the best for grouped queries, far below for MLA", source="paper B, Figure 6, for Transformers"),
    Check(id="H12", title="Splitting gains more the larger the hybrid, 8192/1024", judge=_h12, why=why.size,
          printed="8B < 70B < 405B", source="paper B, Figure 7, for Transformers"),
)  # fmt: skip


def _counts(f: Flips) -> dict[str, int]:
    return {"hybrid": len(f.hybrid), "transformer": len(f.transformer), "compared": f.compared}


def flip_claim(base: HybridMeasures, variants: Variants) -> Claim:
    """H9: in every pair some traffic flips the decision, whatever is varied."""
    firm = {n: firm_flips(p, base, variants) for n, p in PAIRS.items()}
    shown = "; ".join(
        f"{n} {len(f.hybrid)} only the hybrid, {len(f.transformer)} only the Transformer, of {f.compared} "
        f"({len(firm[n]['hybrid'])} and {len(firm[n]['transformer'])} firm)"
        for n, f in base.flips.items()
    )
    proven = {n: flips_of(base.cells[p.hybrid], base.cells[p.transformer], PROVEN) for n, p in PAIRS.items()}
    values = {
        n: {
            "hybrid": f.hybrid, "transformer": f.transformer, "compared": f.compared, "firm": firm[n],
            f"at {PROVEN}": {"hybrid": proven[n].hybrid, "transformer": proven[n].transformer},
            "other Transformers": {o: _counts(flips_of(base.cells[PAIRS[n].hybrid], base.cells[o])) for o in PAIRS[n].others},
        }
        for n, f in base.flips.items()
    }  # fmt: skip
    return Claim(
        id="H9",
        title=f"In every pair some traffic flips the decision (gain {WORTH}), whatever is varied",
        printed=None,
        ours=shown,
        ours_by={JUDGE: shown, ENGINE: "one of the things varied"},
        holds=all(any(f.values()) for f in firm.values()),
        holds_engine=None,
        why=why.flips(base, firm),
        source=OURS,
        values=values,
    )


def steady_claim(base: HybridMeasures, variants: Variants) -> Claim:
    """H13: recurrent kernels twice or half as fast leave the hybrids' decisions as they are."""
    kept: dict[str, float] = {}
    for name, cells in variants.cells.items():
        models = [p.hybrid for p in PAIRS.values() if p.hybrid in cells]
        same = [cells[m][k].worth() == d.worth() for m in models for k, d in base.cells[m].items() if k in cells[m]]
        kept[name] = float(np.mean(same))
    base_sides = both_sides(base)
    orders = {
        name: {
            n: sides[p.hybrid].gain > base_sides[n][1].gain and sides[p.hybrid].ratio_relaxed > base_sides[n][1].ratio_relaxed
            for n, p in PAIRS.items()
        }
        for name, sides in variants.sides.items()
    }
    lost = [f"{n} ({name})" for name, found in orders.items() for n, stays in found.items() if not stays]
    text = "decisions kept: " + ", ".join(f"{n} {v:.0%}" for n, v in kept.items())
    text += "; H2 and H3 " + ("stay in every pair" if not lost else "change for " + ", ".join(lost))
    scans = [v for n, v in kept.items() if n.startswith("scan")]
    medians = {
        name: {
            n: float(np.median(advantage_of(variants.cells[name][p.hybrid], base.cells[p.transformer])))
            for n, p in PAIRS.items()
        }
        for name in variants.sides
    }
    sides = {name: {n: found[p.hybrid]._asdict() for n, p in PAIRS.items()} for name, found in variants.sides.items()}
    return Claim(
        id="H13",
        title="Recurrent kernels half or twice as fast leave H2, H3 and nine decisions of ten as they are",
        printed=None,
        ours=text,
        ours_by={JUDGE: text, ENGINE: "one of the things varied"},
        holds=min(scans) >= STEADY and all(all(v.values()) for n, v in orders.items() if n.startswith("scan")),
        holds_engine=None,
        why=why.steady(base, variants),
        source=OURS,
        values={"decisions kept": kept, "median advantage": medians, "8192/1024": sides},
    )
