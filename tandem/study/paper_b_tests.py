"""Tests T1 to T9 of the facts on paper B: the same numbers with thresholds."""

from __future__ import annotations

import numpy as np

from tandem.study import paper_b_why as why
from tandem.study.paper_b_claims import (
    PIXELS,
    Check,
    Verdict,
    dense_gains,
    judge_cpp,
    judge_domain,
    judge_dynamic,
    listed,
    r1_gains,
)
from tandem.study.paper_b_measures import PRINTED_RATIO, Measures
from tandem.study.paper_b_space import BALANCED_LONG, BALANCED_SHORT, DECODE_HEAVY, PREFILL_HEAVY, mix_name

PRINTED_NEED = {"R1": (0.40e9, 1.23e9), "R1 at 1M": (0.97e9, 1.82e9)}


def _t1(m: Measures) -> Verdict:
    s = m.spans["R1"]
    split = m.space.get("R1", PREFILL_HEAVY).split()
    assert split.ratio is not None
    falls = bool(np.all(np.diff(split.ratio) < 0))
    text = (
        f"{s.relaxed:.2f} to {s.tight:.4f} over its own frontier ({s.own:,.0f} times), {s.common_relaxed:.2f} to "
        f"{s.common_tight:.3f} over the common range ({s.common:.0f} times)"
    )
    return Verdict(falls and s.own >= 10 and s.common >= 10, text, s._asdict() | {"own": s.own, "common": s.common})


def _t2(m: Measures) -> Verdict:
    common, own = ({k: getattr(s, side) for k, s in m.spans.items()} for side in ("common", "own"))
    holds = common["405B"] > common["70B"] > common["8B"] and common["8B"] < 2
    dense = ("405B", "70B", "8B")
    sizes = [common[k] / (PRINTED_RATIO[k][0] / PRINTED_RATIO[k][1]) for k in dense]
    near = all(0.5 <= s <= 2 for s in sizes)
    text = (
        "common range "
        + listed(dense, [common[k] for k in dense], 1)
        + f"; that is {', '.join(f'{s:.1f}' for s in sizes)} times the printed: "
        + ("order and size" if near else "the order only")
        + "; own ends "
        + listed(dense, [own[k] for k in dense], 0)
    )
    return Verdict(holds, text, {"common": common, "own": own})


def _t3(m: Measures) -> Verdict:
    high, low, high_ours, low_ours = m.fixed.values()
    values = {f"{f.ratio:.3g}": f._asdict() for f in m.fixed.values()}
    holds = high.relaxed >= 0.95 and high.tight_of_highest <= 0.2 and 0.35 <= low.relaxed <= 0.5
    text = (
        f"3.5 keeps {high.relaxed:.0%} of the optimum at the relaxed end, {high.tight:.0%} of it "
        f"({high.tight_of_highest:.1%} of the highest) at the tight one; 0.5 keeps {low.relaxed:.0%}. At the same place "
        f"relative to our optimum: {high_ours.ratio:.2f} keeps {high_ours.relaxed:.0%} and {high_ours.tight:.0%}, "
        f"{low_ours.ratio:.2f} keeps {low_ours.relaxed:.0%}"
    )
    return Verdict(holds, text, values)


def _t5(m: Measures) -> Verdict:
    r1, dense = r1_gains(m), dense_gains(m)
    order = [r1[mix_name(k)] for k in (PREFILL_HEAVY, BALANCED_LONG, BALANCED_SHORT, DECODE_HEAVY)]
    mixes = order[0] >= order[1] > order[2] >= order[3]
    models = dense["405B"] > dense["70B"] > dense["8B"]
    text = (
        "R1 "
        + listed(["16k/2k", "16k/16k", "2k/2k", "2k/16k"], order)
        + "; 4k/256 "
        + listed(list(dense), list(dense.values()))
    )
    return Verdict(mixes and models, text, {"mixes in order": mixes, "models in order": models, **r1, **dense})


def _t6(m: Measures) -> Verdict:
    holds, parts = True, []
    for key, printed in PRINTED_NEED.items():
        need = m.needs[key]
        holds &= all(0.5 <= ours / theirs <= 2.0 for ours, theirs in zip((need.low, need.high), printed, strict=True))
        parts.append(f"{key} {need.low / 1e9:.2f} to {need.high / 1e9:.2f} GB/s")
    return Verdict(holds, ", ".join(parts), {k: m.needs[k]._asdict() for k in PRINTED_NEED})


def _t8(m: Measures) -> Verdict:
    plain, kept, llama = m.piggyback["R1", False], m.piggyback["R1", True], m.piggyback["70B", False]
    small = min(plain.by_chunk)
    holds = plain.best < 1 and kept.best >= llama.best
    text = (
        f"R1 piggybacked area {plain.best:.3f} of plain, {kept.best:.3f} with the up-projection kept (Llama-70B "
        f"{llama.best:.3f}); chunks of {small}: {plain.by_chunk[small]:.2f}, {kept.by_chunk[small]:.2f}"
    )
    return Verdict(holds, text, {"R1": plain._asdict(), "R1 kept": kept._asdict(), "70B": llama._asdict()})


def _why_t1(m: Measures) -> str:
    s = m.spans["R1"]
    return (
        "the ratio is decode requests/s/GPU over prefill requests/s/GPU; prefill does not depend on TPOT, so it falls "
        f"exactly as decode throughput does. Our own frontier goes on to batch 1 ({s.top:.0f} tok/s/user), the printed one "
        "ends at 0.056"
    )


def _why_t6(m: Measures) -> str:
    need = m.needs["R1"]
    return (
        f"egress is constant along the frontier ({need.egress / 1e9:.2f} GB/s at 16k) because one prefill instance is "
        "used; ingress "
        f"falls with the decode rate from {need.ingress_relaxed / 1e9:.2f} GB/s; " + why.why_transfer(m)
    )


def _why_t8(m: Measures) -> str:
    plain, kept = m.piggyback["R1", False], m.piggyback["R1", True]
    small = min(plain.by_chunk)
    recovered = (kept.by_chunk[small] - plain.by_chunk[small]) / (1 - plain.by_chunk[small])
    return (
        f"it is worse without, but keeping the up-projection recovers only {recovered:.0%} of the loss at chunks of {small}: "
        + why.why_piggyback(m)
    )


TESTS: tuple[Check, ...] = (
    Check(id="T1", title="R1 16k/2k: the ratio falls monotonically, at least 10 times", source=f"Figure 9 ({PIXELS})",
          printed="65 times", judge=_t1, why=_why_t1),
    Check(id="T2", title="Order of the ratio's spans: 405B > 70B > 8B, the last flat", source=f"Figure 9 ({PIXELS})",
          printed="10.4, 2.1 and 0.8 times", judge=_t2, why=why.why_span),
    Check(id="T3", title="Fixed ratios 3.5 and 0.5 against the optimum", source=f"Figure 10 ({PIXELS})",
          printed="3.5: at least 95 % relaxed, at most 20 % tight; 0.5: 35 to 50 % relaxed", judge=_t3, why=why.why_fixed),
    Check(id="T4", title="Chunked pipeline: TTFT falls 20 times at equal throughput", source=f"Figure 5 ({PIXELS})",
          printed="30 times, throughput within 3 %", judge=judge_cpp, why=why.why_cpp),
    Check(id="T5", title="Order of gains by traffic and by model", source="Figures 7 and 8",
          printed="16k/2k >= 16k/16k > 2k/2k >= 2k/16k; 405B > 70B > 8B", judge=_t5, why=why.why_gain_order),
    Check(id="T6", title="R1's transfer need within a factor of 2", source=f"Figure 12 ({PIXELS})",
          printed="16k/2k 0.40 to 1.23 GB/s, 1M/2k 0.97 to 1.82 GB/s", judge=_t6, why=_why_t6),
    Check(id="T7", title="The frontier of a 72-GPU domain dominates that of 8", source="Figure 11",
          printed="everywhere", judge=judge_domain, why=why.why_domain),
    Check(id="T8", title="Piggybacked MLA is worse unless its up-projection is kept", source="Figure 6, section 4",
          printed="temporarily caching the up-projected keys and values is the remedy", judge=_t8, why=_why_t8),
    Check(id="T9", title="P50 constant traffic within 5 % of dynamic", source="Figure 14",
          printed="curves close", judge=judge_dynamic, why=why.why_dynamic),
)  # fmt: skip
