"""The arithmetic behind each claim of the study of hybrids, from its own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from tandem.perf.costs import Layout, StepLoad
from tandem.study.hybrids_cells import WORTH, Decision, Key, flips_of
from tandem.study.hybrids_measures import HybridMeasures, Variants
from tandem.study.hybrids_space import DECODE_HEAVY, PAIRS, PREFILL_HEAVY, SCAN_OPS

LAW = (
    "a decode step of b sequences takes w + c b; a shared pool adds q / (OSL - 1) of other requests' prompts to c, so under a "
    "bound T it holds (T - w) / (c + q / (OSL - 1)) sequences instead of (T - w) / c and reads its weights for fewer"
)


def name_of(model: str) -> str:
    """A model without its publisher."""
    return model.rsplit("/", 1)[-1].removeprefix("NVIDIA-")


def _work(cell: Decision, key: Key) -> str:
    if cell.loads is None:
        return "no deployment meets the bound"
    share, stretch = cell.loads.prompt_share(key[1]), cell.loads.stretch(key[2])
    gain = f"gain {cell.gain:.2f}" if cell.gain is not None else "only split meets the bound"
    return f"{gain} with {share:.0%} of the work in prefill and steps {stretch:.2f} times their sequences' part"


def _beside(m: HybridMeasures, pair: str, key: Key) -> str:
    p = PAIRS[pair]
    return (
        f"{key[0]}/{key[1]} at {key[2] * 1e3:.0f} ms, {name_of(p.hybrid)}: {_work(m.cells[p.hybrid][key], key)}; "
        f"{name_of(p.transformer)}: {_work(m.cells[p.transformer][key], key)}"
    )


def _has(m: HybridMeasures, key: Key) -> bool:
    return key in m.cells[PAIRS["9B"].hybrid]


def advantage(m: HybridMeasures) -> str:
    """H1."""
    parts = []
    for name, p in PAIRS.items():
        h, t = m.states[p.hybrid], m.states[p.transformer]
        parts.append(f"{name} {t.at(8192) / (2 * h.s0_bytes + h.k_bytes * 8192):.1f}")
    return (
        "a decoding sequence moves 2 s0 + k n bytes a step in a hybrid and k n in a Transformer; at 8,192 tokens the "
        "Transformer moves these times as much: " + ", ".join(parts) + ". Below "
        + ", ".join(f"{n} {c.decode_tokens:,.0f}" for n, c in m.crossings.items())
        + " tokens of context the hybrid moves more, and serves less"
    )  # fmt: skip


def shares(m: HybridMeasures) -> str:
    """H2 and H3."""
    parts = []
    for name, p in PAIRS.items():
        h, t = (m.sides[x, PREFILL_HEAVY].ratio_relaxed for x in (p.hybrid, p.transformer))
        parts.append(f"{name} {h / (1 + h):.0%} to {t / (1 + t):.0%}")
    return (
        "prompts cost both about the same arithmetic, decoding costs the hybrid less, so a larger share of its GPUs prefills "
        "(relaxed end, hybrid to Transformer: " + ", ".join(parts) + "), and only what prefills can be moved apart"
    )


def spans(m: HybridMeasures) -> str:
    """H4."""
    e = m.ends["9B"]
    return (
        f"the ratio is decode requests/s over prefill requests/s a GPU and falls as decode throughput does; 9B, {e.low:.0f} to "
        f"{e.high:.0f} tok/s/user: {e.hybrid[0]:.2f} to {e.hybrid[1]:.2f} beside {e.transformer[0]:.2f} to "
        f"{e.transformer[1]:.3f}. A Transformer reaches the upper end with one or two sequences, the hybrid with room left: "
        "its own frontier goes on, and falls as far"
    )


def transfer(m: HybridMeasures) -> str:
    """H5."""
    p = PAIRS["56B"]
    h, t = m.states[p.hybrid], m.states[p.transformer]
    need = {x: m.sides[x, DECODE_HEAVY].need_high / 1e9 for x in (p.hybrid, p.transformer)}
    return (
        "Equations 1 and 2 with s0 + k * isl bytes a request. A fixed s0 is spread over few tokens where prompts are short: "
        f"56B at 1,024 tokens {h.at(1024) / 1e6:,.0f} MB beside {t.at(1024) / 1e6:,.0f}, so {need[p.hybrid]:.1f} GB/s beside "
        f"{need[p.transformer]:.1f}"
    )


def crossing(m: HybridMeasures) -> str:
    """H6."""
    parts = []
    for name, p in PAIRS.items():
        h, t = m.states[p.hybrid], m.states[p.transformer]
        parts.append(f"{name} {h.s0_bytes / 1e6:,.1f} MB / ({t.k_bytes:,} - {h.k_bytes:,} B)")
    return "s0 / (k of the Transformer - k of the hybrid): " + ", ".join(parts) + "; half of it with a state in bf16"


def long_prompts(m: HybridMeasures) -> str:
    """H7."""
    text = LAW + f". Splitting is worth {WORTH} while prefill is a large enough share: the hybrid's c is smaller"
    key = (8192, 8192, 0.02)
    if _has(m, key):
        text += ". " + _beside(m, "9B", key)
    key = (32768, 4096, 0.05)
    if _has(m, key):
        loads = [m.cells[x][key].loads for x in (PAIRS["9B"].hybrid, PAIRS["9B"].transformer)]
        if all(loads):
            costs = [x.shared_prompt_s / x.own_prompt_s for x in loads if x]
            text += (
                ". At 32k and 50 ms the Transformer gains by something else: its caches force wide instances, in which a "
                f"prompt costs {costs[1]:.1f} times what it costs in a prefill pool ({costs[0]:.1f} for the hybrid)"
            )
    return text


def short_prompts(m: HybridMeasures) -> str:
    """H8."""
    text = (
        "at short context a hybrid's decode costs more than the Transformer's (its state is read and written whatever the "
        "length), so prefill is the smaller share"
    )
    key = (512, 1024, 0.02)
    if _has(m, key):
        text += ". " + _beside(m, "56B", key)
    key = (512, 512, 0.02)
    if _has(m, key):
        text += ". The exception is a tie, closer than the 3 % to which pools are balanced: " + _beside(m, "9B", key)
    return text


def law(m: HybridMeasures) -> str:
    """H10."""
    return LAW + (
        ". Its four times (w, c, and a prompt in the prefill pool's layout and in the decode pool's) come from the split "
        "deployment; the search also lets the shared one choose another layout or piggyback, so the law promises a little much"
    )


def piggyback(m: HybridMeasures) -> str:
    """H11."""
    return (
        "a chunk continues from the state where the last one ended and recomputes nothing; only the few attention layers read "
        "earlier tokens again"
    )


def size(m: HybridMeasures) -> str:
    """H12."""
    parts = []
    for name in ("9B", "12B", "56B"):
        pair = [m.sides[x, PREFILL_HEAVY].ratio_relaxed for x in (PAIRS[name].hybrid, PAIRS[name].transformer)]
        parts.append(f"{name} {pair[0] / (1 + pair[0]):.0%} and {pair[1] / (1 + pair[1]):.0%}")
    return (
        "the share of GPUs that prefill (hybrid and Transformer): "
        + ", ".join(parts)
        + ". It grows with a Transformer's size, whose arithmetic grows faster than its cache; these hybrids' state grows along"
    )


def _share_ratios(m: HybridMeasures) -> list[float]:
    """Prefill share of the hybrid over that of its Transformer in every cell with long prompts."""
    found = []
    for p in PAIRS.values():
        for key, cell in m.cells[p.hybrid].items():
            other = m.cells[p.transformer][key]
            if key[0] >= 8192 and cell.loads and other.loads:
                found.append(cell.loads.prompt_share(key[1]) / other.loads.prompt_share(key[1]))
    return found or [1.0]


def flips(m: HybridMeasures, firm: Mapping[str, Mapping[str, list[Key]]]) -> str:
    """H9."""
    told = []
    for name, sides in firm.items():
        for side, keys in sides.items():
            told += [_beside(m, name, key) for key in keys[-1:] if side in ("hybrid", "transformer")]
    none = [name for name, sides in firm.items() if not any(sides.values())]
    ratio = median(_share_ratios(m))
    text = (
        f"equal bounds stretch steps alike, so only the share of prefill differs ({ratio:.1f} times, median of prompts from 8k "
        "on), and a row has one OSL at which a gain passes the threshold: the decisions part between two such OSLs only. "
    )
    if none:
        text += f"No flip of {', '.join(none)} survives every variant. "
    return text + (" | ".join(told) if told else "None is firm")


def steady(m: HybridMeasures, variants: Variants) -> str:
    """H13."""
    other = {n: flips_of(variants.other_gpu[p.hybrid], variants.other_gpu[p.transformer]) for n, p in PAIRS.items()}
    told = ", ".join(f"{n} {len(f.hybrid)} and {len(f.transformer)} of {f.compared}" for n, f in other.items())
    shares = {n: scan_shares(m, p.hybrid) for n, p in PAIRS.items()}
    varied = variants.sides["scan x2"]
    gains = ", ".join(f"{n} {varied[p.hybrid].gain:.2f}" for n, p in PAIRS.items())
    return (
        "recurrent kernels take this share of a prompt and of a decode step at 8192/1024 and 50 tok/s/user: "
        + ", ".join(f"{n} {a:.0%} and {b:.0%}" for n, (a, b) in shares.items())
        + f". Twice as slow, they slow decode and prefill down, and area gains become {gains}. On H200 with FP8 weights only "
        f"the hybrid, and only the Transformer, is worth splitting in: {told} cells"
    )


def scan_shares(m: HybridMeasures, model: str) -> tuple[float, float]:
    """Share of the recurrent kernels in the kernel time of a prompt alone and of a decode step, at 50 tok/s/user."""
    swept = m.space.get(model, PREFILL_HEAVY)
    split, perf = swept.split(), swept.perf
    i = split.index(50.0) or 0
    layout = Layout.of(swept.parallelism(split, i))
    loads = (
        StepLoad(prefill_seqs=1.0, isl=float(PREFILL_HEAVY[0])),
        perf.decode_load(layout, float(swept.batch(split, i)), swept.sweep.workload),
    )
    found = []
    for load in loads:
        parts = perf.pricer.breakdown(layout, load)
        found.append(sum(parts[k]["seconds"] for k in SCAN_OPS if k in parts) / sum(c["seconds"] for c in parts.values()))
    return found[0], found[1]
