"""Findings F1 to F12 of paper B beside our numbers: what is printed, what the sweeps give, whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tandem.study import paper_b_why as why
from tandem.study.paper_b_measures import Mapping, Measures, step_parts
from tandem.study.paper_b_space import (
    BALANCED_LONG,
    BALANCED_SHORT,
    DECODE_HEAVY,
    ENGINE,
    EXTREME_DECODE,
    JUDGE,
    PREFILL_HEAVY,
    R1_MIXES,
    SHORT_OUTPUT,
    mix_name,
)
from tandem.study.result import Claim

DENSE = ("8B", "70B", "405B")
FAR_BELOW = 0.9
"""Share of the area under which a frontier counts as far below another one."""
PIXELS = "facts' pixel measurement"


class Verdict(NamedTuple):
    """Whether a claim holds for one backend, our numbers in words, and the numbers."""

    holds: bool
    text: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A printed claim with the function that judges it."""

    id: str
    title: str
    printed: str
    source: str
    judge: Callable[[Measures], Verdict]
    why: Callable[[Measures], str]

    def claim(self, judging: Measures, engine: Measures | None) -> Claim:
        """The claim as judged by kernels only, with the engine's verdict beside it."""
        own = self.judge(judging)
        other = self.judge(engine) if engine is not None else None
        texts = {JUDGE: own.text} | ({ENGINE: other.text} if other else {})
        return Claim(
            id=self.id,
            title=self.title,
            printed=self.printed,
            ours="; ".join(f"{name}: {text}" for name, text in texts.items()),
            ours_by=texts,
            holds=own.holds,
            holds_engine=other.holds if other else None,
            why=self.why(judging),
            source=self.source,
            values={JUDGE: own.values} | ({ENGINE: other.values} if other else {}),
        )


def listed(names: Sequence[str], numbers: Sequence[float], digits: int = 2) -> str:
    """`a 1.00, b 2.00`."""
    return ", ".join(f"{n} {v:,.{digits}f}" for n, v in zip(names, numbers, strict=True))


def r1_gains(m: Measures) -> dict[str, float]:
    """Area gains of R1 by mix."""
    return {mix_name(mix): m.gains["R1", mix].area for mix in (*R1_MIXES, EXTREME_DECODE)}


def dense_gains(m: Measures) -> dict[str, float]:
    """Area gains of the three Llamas at 4096/256."""
    return {k: m.gains[k, SHORT_OUTPUT].area for k in DENSE}


def _f1(m: Measures) -> Verdict:
    gains = r1_gains(m)
    most, least = max(gains, key=lambda k: gains[k]), min(gains, key=lambda k: gains[k])
    holds = most == mix_name(PREFILL_HEAVY) and least == mix_name(EXTREME_DECODE)
    return Verdict(holds, "area gain " + listed(list(gains), list(gains.values())), gains)


def _f2(m: Measures) -> Verdict:
    gains = dense_gains(m)
    holds = gains["405B"] > gains["70B"] > gains["8B"]
    return Verdict(holds, "area gain at 4096/256 " + listed(list(gains), list(gains.values())), gains)


def _f3(m: Measures) -> Verdict:
    r1, llama, kept = m.piggyback["R1", False], m.piggyback["70B", False], m.piggyback["R1", True]
    small = min(r1.by_chunk)
    holds = r1.best < FAR_BELOW <= llama.best
    text = (
        f"piggybacked area over plain in-flight batching, best chunk: R1 {r1.best:.2f}, Llama-70B {llama.best:.2f}; chunks "
        f"of {small}: {r1.by_chunk[small]:.2f}, {llama.by_chunk[small]:.2f}"
    )
    return Verdict(holds, text, {"R1": r1._asdict(), "70B": llama._asdict(), "R1 kept": kept._asdict()})


def _f4(m: Measures) -> Verdict:
    h = m.heights[DECODE_HEAVY]
    holds = h["piggybacked"] >= max(h.values())
    text = "R1 2k/16k, relaxed end, tok/s/GPU: " + listed(list(h), list(h.values()), 0)
    return Verdict(holds, text, {mix_name(k) if k != (0, 0) else "70B 2048/16384": v for k, v in m.heights.items()})


def cpp_summary(m: Measures) -> dict[int, tuple[float, float, float]]:
    """Chunk -> (TTFT at PP 1 over PP 32, lowest and highest throughput over that at PP 1)."""
    found = {}
    for chunk, points in m.cpp.items():
        rates = [p.prompt_tokens_per_s_per_gpu / points[0].prompt_tokens_per_s_per_gpu for p in points]
        found[chunk] = points[0].ttft_s / points[-1].ttft_s, min(rates), max(rates)
    return found


def judge_cpp(m: Measures) -> Verdict:
    """T4 and F5: at some chunk size TTFT falls at least 20 times with throughput within 5 %."""
    found = cpp_summary(m)
    good = {c: v for c, v in found.items() if v[0] >= 20 and v[1] >= 0.95 and v[2] <= 1.05}
    shown = max(good, default=min(found))
    fall, low, high = found[shown]
    first, last = m.cpp[shown][0], m.cpp[shown][-1]
    text = (
        f"chunks of {shown:,}: {first.ttft_s:.0f} s -> {last.ttft_s:.1f} s ({fall:.0f} times), throughput {low:.2f} to "
        f"{high:.2f}; chunks of 512: {found[512][0]:.0f} times, {found[512][1]:.2f} to {found[512][2]:.2f}"
    )
    return Verdict(bool(good), text, {str(c): {"fall": v[0], "low": v[1], "high": v[2]} for c, v in found.items()})


def _batch_per_gpu(p: Mapping) -> float:
    return p.split_batch / p.split.gpus


def _f6(m: Measures) -> Verdict:
    r1, llama = m.mapping["R1"], m.mapping["70B"]
    experts = all(p.split.ep > 1 for p in r1)
    data_to_tensor = r1[0].split.dp > r1[0].split.tp and r1[-1].split.tp > r1[-1].split.dp
    shrinks = all(a >= b for a, b in zip([_batch_per_gpu(p) for p in r1], [_batch_per_gpu(p) for p in r1][1:], strict=False))
    grows = llama[-1].split.tp >= 4 * llama[0].split.tp
    text = (
        f"R1 from ({r1[0].split}) with {_batch_per_gpu(r1[0]):.0f} sequences a GPU to ({r1[-1].split}) with "
        f"{_batch_per_gpu(r1[-1]):.2g}; Llama-70B TP {llama[0].split.tp} to {llama[-1].split.tp}; expert parallelism at "
        f"{sum(p.split.ep > 1 for p in r1)} of {len(r1)} points"
    )
    values = {
        "experts throughout": experts,
        "data to tensor parallel": data_to_tensor,
        "batch shrinks": shrinks,
        "70B tp grows": grows,
    }
    return Verdict(all(values.values()), text, values)


def _f7(m: Measures) -> Verdict:
    values = {k: v._asdict() for k, v in m.tensor.items()}
    holds = all(v.split_tp > v.shared_tp and v.middle_gain > v.relaxed_gain for v in m.tensor.values())
    text = "; ".join(
        f"{k} middle third: TP {v.split_tp:.1f} split, {v.shared_tp:.1f} shared, gain {v.middle_gain:.2f} (relaxed third "
        f"{v.relaxed_gain:.2f})"
        for k, v in m.tensor.items()
    )
    return Verdict(holds, text, values)


def _f8(m: Measures) -> Verdict:
    relaxed = {k: s.relaxed for k, s in m.spans.items()}
    falls = relaxed["R1"] > relaxed["405B"] > relaxed["70B"] > relaxed["8B"]
    holds = falls and m.spans["R1"].common >= 10
    low, high = m.common
    text = (
        "relaxed end "
        + listed(list(relaxed), list(relaxed.values()))
        + f"; over {low:.0f} to {high:.0f} tok/s/user R1 moves {m.spans['R1'].common:.0f} times, "
        + f"8B {m.spans['8B'].common:.1f} times"
    )
    return Verdict(holds, text, {k: s._asdict() for k, s in m.spans.items()})


def _f9(m: Measures) -> Verdict:
    best = m.elastic.best_fixed
    holds = best["R1"][1] < 0.95
    text = "the best single ratio keeps of the matched area: " + ", ".join(f"{k} {share:.0%}" for k, (_, share) in best.items())
    text += f"; of R1's four mixes at 50 tok/s/user {m.elastic.best_mix_kept:.0%}"
    return Verdict(holds, text, m.elastic.to_json())


def judge_domain(m: Measures) -> Verdict:
    """T7 and F10: the wider domain is nowhere worse, and better where the paper says."""
    lowest = {k: min(r for _, r in d.ratios) for k, d in m.domain.items()}
    holds = all(v >= 1 - 1e-9 for v in lowest.values())
    parts = []
    for model, d in m.domain.items():
        helped = [x for x, r in d.ratios if r > 1.05]
        span = f"{helped[0]:.0f} to {helped[-1]:.0f} tok/s/user" if helped else "nowhere"
        parts.append(
            f"{model} area {d.area:.2f} times, more than 5 % at {span}, B200's own domain of 8 gives {d.b200_area:.2f}"
        )
    return Verdict(holds, "; ".join(parts), {k: d._asdict() for k, d in m.domain.items()})


def _f11(m: Measures) -> Verdict:
    link = m.space.get("R1", PREFILL_HEAVY).sweep.hardware.scale_out_bytes_per_s
    top = {k: n.high for k, n in m.needs.items()}
    text = "highest need, GB/s a GPU: " + listed(list(top), [v / 1e9 for v in top.values()]) + f"; link {link / 1e9:.0f}"
    return Verdict(max(top.values()) < link, text, {k: n._asdict() for k, n in m.needs.items()})


def judge_dynamic(m: Measures) -> Verdict:
    """T9 and F12: constant P50 lengths within 5 % of the trace-shaped traffic."""
    d = m.dynamic[0]
    text = f"area of constant 4096/512 over trace-shaped traffic of that P50: {d.p50:.2f}; constant means: {d.mean:.2f}"
    return Verdict(abs(d.p50 - 1) <= 0.05, text, {x.name: x._asdict() for x in m.dynamic})


def _why_f1(m: Measures) -> str:
    heavy, light = m.gains["R1", PREFILL_HEAVY], m.gains["R1", EXTREME_DECODE]
    long, short = m.gains["R1", BALANCED_LONG], m.gains["R1", BALANCED_SHORT]
    return (
        "the more of the GPUs prefill, the more there is to take out of decode's way: "
        f"{why.prefill_share(heavy.ratio):.0%} at 16k/2k, {why.prefill_share(light.ratio):.1%} at 1k/32k. Between them "
        f"ours differ from Figure 8: 2k/2k gains {short.area:.2f} and 16k/16k {long.area:.2f} (see T5). "
        f"At one interactivity 16k/2k gains up to {heavy.largest:.2f} times, at {heavy.largest_at:.0f} tok/s/user"
    )


def _why_f7(m: Measures) -> str:
    p = m.mapping["70B"][len(m.mapping["70B"]) // 2 - 1]
    floors = []
    for model in ("70B", "405B"):
        middle = m.mapping[model][len(m.mapping[model]) // 2]
        swept = m.space.get(model, PREFILL_HEAVY)
        split = swept.split()
        i = split.index(middle.at) or 0
        step, tp = step_parts(swept, split, i), middle.split.tp
        floors.append(f"{model} at {middle.at:.0f} tok/s/user TP {step.weights * tp / (1 / middle.at - step.launches):.1f}")
    return (
        f"at {p.at:.0f} tok/s/user Llama-70B decodes on ({p.split}) with batch {p.split_batch} in a pool of its own, on "
        f"({p.shared}) with batch {p.shared_batch} when shared: prompts take their part of every token's time there, the "
        "batch shrinks to pay for it, and a small batch gives a wide instance too little work. But launches and reading "
        f"the weights once a token already ask for {' and '.join(floors)}, so the largest model is driven to the same "
        "width in either mode and differs by its batch instead"
    )


def _why_f9(m: Measures) -> str:
    e = m.elastic
    worst = min(min(row) for row in e.kept)
    budgets = ", ".join(f"{w.gpus} GPUs {w.kept:.0%}" for w in e.whole[:4])
    return (
        f"matched ratios of R1's mixes at 50 tok/s/user are {listed(e.mixes, e.ratios)}; pools sized for one mix and fed "
        f"another keep as little as {worst:.0%}. The best compromise, {e.best_mix_ratio:.2f}, serves {e.best_mix_kept:.0%} "
        f"on average, so re-matching is worth {1 / e.best_mix_kept:.2f} times the GPUs there. Whole numbers of instances "
        f"cost more in small deployments: of exact balance R1 16k/2k keeps in {budgets}. Time lost in changing over is not "
        "counted"
    )


FINDINGS: tuple[Check, ...] = (
    Check(id="F1", title="Splitting helps most when ISL >> OSL", source="Figures 1 and 8; section 4",
          printed="R1: clear gap at 16k/2k, hardly any at 1k/32k (normalised)", judge=_f1, why=_why_f1),
    Check(id="F2", title="Splitting helps larger models more", source="Figure 7",
          printed="4096/256: 8B small gap, 70B clear, 405B largest (normalised)", judge=_f2,
          why=lambda m: why.why_models(m, SHORT_OUTPUT)),
    Check(id="F3", title="Piggybacking suffers from latent attention", source="Figure 6",
          printed="16k/2k: R1 piggybacked far below the best co-located, Llama-70B close", judge=_f3, why=why.why_piggyback),
    Check(id="F4", title="Piggybacking is best for decode-heavy traffic at relaxed latency", source="Figure 8",
          printed="trend, no number", judge=_f4, why=why.why_decode_heavy),
    Check(id="F5", title="Chunked pipeline parallelism answers strict TTFT", source=f"Figure 5 ({PIXELS})",
          printed="R1, 256k, 64 GPUs: 89 s at PP 1, 2.9 s at PP 32; throughput 0.99 to 1.03", judge=judge_cpp, why=why.why_cpp),
    Check(id="F6", title="Tighter TPOT: smaller batch, more tensor parallelism", source="section 4",
          printed="R1: experts spread throughout, attention from data to tensor parallel, smaller batch; 70B: TP 2 to 64",
          judge=_f6, why=why.why_mapping),
    Check(id="F7", title="Decode pools use more tensor parallelism and win at medium latency", source="section 4",
          printed="text, no number", judge=_f7, why=_why_f7),
    Check(id="F8", title="The best context-to-generation ratio moves a lot", source=f"Figure 9 ({PIXELS})",
          printed="R1 3.64 to 0.056, 405B 2.07 to 0.20, 70B 0.94 to 0.45, 8B 0.33 to 0.43", judge=_f8, why=why.why_ratio),
    Check(id="F9", title="A fixed ratio loses", source=f"Figure 10 ({PIXELS})",
          printed="R1: 3.5 falls from 0.96 to 0.05 of the highest, 0.5 stays at 0.42 of 0.975", judge=_f9, why=_why_f9),
    Check(id="F10", title="A larger link domain always helps splitting", source="Figure 11",
          printed="72 at least as good as 8 everywhere; R1 at medium latency, Llama-70B at low latency", judge=judge_domain,
          why=why.why_domain),
    Check(id="F11", title="Moving the cache is not the bottleneck", source="section 5.1, Figure 12",
          printed="0.4 to 1.8 GB/s a GPU, within provisioned bandwidth", judge=_f11, why=why.why_transfer),
    Check(id="F12", title="Constant P50 lengths stand for dynamic traffic", source="Appendix C, Figure 14",
          printed="Llama-70B, 4096/512: curves close", judge=judge_dynamic, why=why.why_dynamic),
)  # fmt: skip
