"""The arithmetic behind the verdicts: which term decides, and what would have to change for a claim to hold."""

from __future__ import annotations

from tandem.perf.costs import Layout, StepLoad
from tandem.perf.efficiency import bind
from tandem.spec.units import itemsize
from tandem.study.paper_b_measures import PRINTED_RATIO, Measures, StepParts, step_parts
from tandem.study.paper_b_space import (
    BALANCED_LONG,
    BALANCED_SHORT,
    CPP_GPUS,
    CPP_ISL,
    DECODE_HEAVY,
    MILLION,
    MODELS,
    PREFILL_HEAVY,
    mix_name,
)
from tandem.study.sweep import MAX_INSTANCE_GPUS


def prefill_share(ratio: float) -> float:
    """Share of a split deployment's GPUs that prefill."""
    return ratio / (1.0 + ratio)


def why_gain_order(m: Measures) -> str:
    """16k/16k against 2k/2k: the prefill share decides, and the cache's bytes decide that."""
    long, short = m.gains["R1", BALANCED_LONG], m.gains["R1", BALANCED_SHORT]
    prompt_long = long.prefill_requests_per_s_per_gpu * BALANCED_LONG[0]
    prompt_short = short.prefill_requests_per_s_per_gpu * BALANCED_SHORT[0]
    needed = short.decode_tokens_per_s_per_gpu * prompt_long / prompt_short
    swept = m.space.get("R1", BALANCED_LONG)
    context = swept.sweep.workload.decode_context
    cache = context * swept.sweep.model.kv_bytes_per_token(kv=swept.sweep.precision.kv)
    streaming = bind(swept.sweep.hardware, "mla_decode", swept.sweep.precision.kv).bytes_per_s / cache
    others = ", ".join(f"{kv} cache {a:.2f} against {b:.2f}" for kv, (a, b) in m.cache_gains.items())
    shares = ", ".join(
        f"{mix_name(mix)} {prefill_share(m.gains['R1', mix].ratio):.0%}"
        for mix in (PREFILL_HEAVY, BALANCED_SHORT, BALANCED_LONG, DECODE_HEAVY)
    )
    return (
        f"the gain follows the share of GPUs that prefill at the relaxed end: {shares}. From 2k/2k to 16k/16k a prompt "
        f"token costs {prompt_short / prompt_long:.2f} times as much, but a decoded token "
        f"{short.decode_tokens_per_s_per_gpu / long.decode_tokens_per_s_per_gpu:.1f} times, because it reads "
        f"{cache / 1e6:,.0f} MB of latent cache at {context:,.0f} tokens of context. For equal shares decode at 16k/16k "
        f"would have to give {needed:,.0f} tok/s/GPU; ours gives {long.decode_tokens_per_s_per_gpu:,.0f}, and a GPU that "
        f"did nothing but stream that cache as fast as the measured kernel {streaming:,.0f}. It is no matter of format: "
        f"{others}; nor of the measure: the largest gains at one interactivity are {long.largest:.2f} and "
        f"{short.largest:.2f}"
    )


def why_models(m: Measures, mix: tuple[int, int]) -> str:
    """Why splitting pays more for larger models: GPU seconds of a prompt against the token period that users want."""
    parts = []
    for model in ("8B", "70B", "405B"):
        gain = m.gains[model, mix]
        parts.append(f"{model} {1.0 / gain.prefill_requests_per_s_per_gpu:.3f} s and {prefill_share(gain.ratio):.0%}")
    return (
        f"GPU seconds of one prompt, and share of GPUs that prefill: {'; '.join(parts)}. In a shared pool each token waits "
        "for (g - 1) / (OSL - 1) of these prompts, with g sequences in the group, while the token period that a user "
        "wants stays the same"
    )


def _prompt_seconds(m: Measures, chunks: float, cached_up: bool = False) -> dict[str, float]:
    """Kernel seconds of one 16k prompt of R1 on one attention group of EP64, by kind."""
    pricer = m.space.get("R1", PREFILL_HEAVY).perf.pricer
    load = StepLoad(prefill_seqs=1.0, isl=float(PREFILL_HEAVY[0]), chunks=chunks, cached_up=cached_up)
    classes = pricer.breakdown(Layout(tp=1.0, pp=1.0, ep=64.0, dp=64.0, cpp=1.0), load)
    found = {k: chunks * (c["seconds"] - c["fixed"]) for k, c in classes.items()}
    return found | {"fixed": chunks * sum(c["fixed"] for c in classes.values())}


def why_piggyback(m: Measures) -> str:
    """What chunks cost R1: up-projection again, keys and values read again, launches."""
    whole, cut, kept = _prompt_seconds(m, 1.0), _prompt_seconds(m, 32.0), _prompt_seconds(m, 32.0, cached_up=True)
    up = sum(cut.values()) - sum(kept.values())
    reread, fixed = cut["mla_prefill"] - whole["mla_prefill"], cut["fixed"] - whole["fixed"]
    plain, cached = m.piggyback["R1", False], m.piggyback["R1", True]
    smallest = min(plain.by_chunk)
    far = [c for c, share in plain.by_chunk.items() if share < 0.9 <= m.piggyback["70B", False].by_chunk[c]]
    bound = (
        f"The claim holds for step budgets up to {max(far):,} tokens; the paper states none"
        if far
        else "No step budget changes that"
    )
    isl, osl = PREFILL_HEAVY
    keep_up = next(b for b in range(smallest, 0, -1) if b * isl <= (osl - 1) * (smallest - b))
    return (
        f"a 16k prompt takes {sum(whole.values()):.2f} s of kernels whole and {sum(cut.values()):.2f} s in 32 chunks of "
        f"512: up-projecting the latents again {up:.2f} s, reading keys and values again {reread:.2f} s, launches "
        f"{fixed:.2f} s. At {smallest} tokens a chunk R1 keeps {plain.by_chunk[smallest]:.0%} of the area (Llama-70B "
        f"{m.piggyback['70B', False].by_chunk[smallest]:.0%}), with the up-projection kept "
        f"{cached.by_chunk[smallest]:.0%}. A free choice takes chunks of {max(plain.by_chunk):,}, two to a prompt, which "
        f"recompute little. Also no more than {keep_up} sequences of an attention group get their prompts in by chunks of "
        f"{smallest}, and R1 on attention data parallelism wants several times as many. {bound}"
    )


def why_decode_heavy(m: Measures) -> str:
    """Prefill is too small a part of decode-heavy traffic for any arrangement to matter."""
    share = prefill_share(m.gains["R1", DECODE_HEAVY].ratio)
    h = m.heights[DECODE_HEAVY]
    spread = max(h.values()) / min(h.values()) - 1
    swept = m.space.get("R1", DECODE_HEAVY)
    step = step_parts(swept, swept.split(), 0)
    return (
        f"prefill is {share:.1%} of the GPU time of 2k/16k, so no arrangement of it can win more than that; the three "
        f"modes lie within {spread:.1%}, less than any prediction can tell apart. To lead, prompt chunks would have to "
        f"ride for free on decode steps; but there a step is {step.compute:.4f} s of arithmetic (latent attention of all "
        f"heads) to {step.cache + step.weights:.4f} s of bytes, so there is no idle arithmetic to give away"
    )


def why_mapping(m: Measures) -> str:
    """Expert parallelism against sliced experts where the batch is small."""
    point = next((p for p in m.mapping["R1"] if p.split.gpus > 1 and p.split.ep == 1), None)
    if point is None:
        return "expert parallelism spans the instance at every point of the frontier"
    swept = m.space.get("R1", PREFILL_HEAVY)
    p, batch = point.split, float(point.split_batch)
    seconds = []
    for ep in (1, p.tp * p.dp):
        layout = Layout(float(p.tp), float(p.pp), float(ep), float(p.dp), 1.0)
        classes = swept.perf.pricer.breakdown(layout, swept.perf.decode_load(layout, batch, swept.sweep.workload))
        net = {k: classes[k] for k in ("allreduce", "alltoall") if k in classes}
        seconds.append((sum(c["seconds"] for c in classes.values()), sum(c["seconds"] for c in net.values())))
    (sliced, sliced_net), (spread, spread_net) = seconds
    return (
        f"up to {point.at:.0f} tok/s/user experts are spread over the whole instance; there, at {p.dp * p.tp} GPUs and "
        f"batch {point.split_batch}, a step takes {spread:.5f} s with EP {p.tp * p.dp} ({spread_net:.5f} s of it "
        f"all-to-all, two measured launches a layer) and {sliced:.5f} s with sliced experts joined by all-reduce "
        f"({sliced_net:.5f} s). A faster all-to-all than the measured kernels would restore the claim; the difference is "
        "within the curves' errors"
    )


def why_span(m: Measures) -> str:
    """Own ends against the common range: at its own end every model runs batch 1 on a large instance."""
    parts = []
    for model in ("405B", "70B", "8B"):
        s = m.spans[model]
        rate, end = f"{s.relaxed_tokens_per_s_per_gpu:,.0f}", f"{s.top:.0f} / {s.tight_gpus}"
        parts.append(f"{model} {rate} / ({end}) = {s.relaxed_tokens_per_s_per_gpu * s.tight_gpus / s.top:,.0f}")
    low, high = m.common
    order = " > ".join(sorted(("405B", "70B", "8B"), key=lambda k: -m.spans[k].own))
    small, large = (_step_at(m, model, high) for model in ("8B", "405B"))
    return (
        f"its own frontier leads every model to batch 1 on {m.spans['8B'].tight_gpus} GPUs or more, so its span is relaxed "
        f"decode tok/s/GPU over (top tok/s/user / GPUs): {'; '.join(parts)}. That compares services of "
        f"{m.spans['8B'].top:.0f} and {m.spans['405B'].top:.0f} tok/s/user and orders {order}; the search is right, and "
        f"any simulator with TP up to {MAX_INSTANCE_GPUS} gives the 8B model a long tail that the printed flat curve "
        f"lacks, so that curve stops earlier. Over what all four reach, {low:.0f} to {high:.0f} tok/s/user, the order is "
        f"the printed one. At its upper end the 8B model's step still is {small.cache:.4f} s of cache to "
        f"{small.weights:.4f} s of weights: throughput is memory bandwidth over cache bytes, whatever the batch. 405B is "
        f"at batch 1 there, {large.weights:.4f} s of weights and {large.launches + large.network:.4f} s of launches and "
        f"links to {large.cache:.4f} s of cache: every sequence less is throughput lost"
    )


def _step_at(m: Measures, model: str, at: float) -> StepParts:
    swept = m.space.get(model, PREFILL_HEAVY)
    split = swept.split()
    i = split.index(at * (1 - 1e-9))
    assert i is not None
    return step_parts(swept, split, i)


def overlapped_ratio(m: Measures, model: str) -> float:
    """The relaxed ratio if decode kernels overlapped arithmetic and bytes perfectly and cost nothing to launch."""
    swept = m.space.get(model, PREFILL_HEAVY)
    step = step_parts(swept, swept.split(), 0)
    return m.spans[model].relaxed * sum(step) / (max(step.compute, step.weights + step.cache) + step.network)


def why_ratio(m: Measures) -> str:
    """What lies between our relaxed ratios and the printed ones: how well decode kernels overlap."""
    ours = ", ".join(f"{k} {overlapped_ratio(m, k):.2f}" for k in MODELS)
    swept = m.space.get("R1", PREFILL_HEAVY)
    step = step_parts(swept, swept.split(), 0)
    whole = sum(step)
    return (
        "the ratio is decode requests/s/GPU over prefill requests/s/GPU, and decode slows down as batches shrink while "
        "prefill does not. Printed relaxed ends (3.64, 2.07, 0.94, 0.33) have our order and lie up to "
        f"{max(p / m.spans[k].relaxed for k, (p, _) in PRINTED_RATIO.items()):.1f} times higher: R1's relaxed decode step "
        f"is {(step.weights + step.cache) / whole:.0%} bytes, {step.compute / whole:.0%} arithmetic, "
        f"{step.network / whole:.0%} links and {step.launches / whole:.0%} launches as measured kernels add them up; with "
        f"arithmetic hidden behind bytes and launches free, as an ideal simulator may have it, ours become {ours}"
    )


def why_fixed(m: Measures) -> str:
    """What a fixed ratio can do at either end, from the balance alone."""
    relaxed, ideal = m.spans["R1"].relaxed, overlapped_ratio(m, "R1")
    gain = m.gains["R1", PREFILL_HEAVY]
    needed = 0.95 * 4.5 - 1
    _, _, high, low = m.fixed.values()
    return (
        f"our matched ratio at the relaxed end is {relaxed:.2f}, the paper's 3.64: prefill takes "
        f"{gain.prefill_requests_per_s_per_gpu:.2f} requests/s/GPU, decode gives {gain.decode_tokens_per_s_per_gpu:,.0f} "
        f"tok/s/GPU. A fixed 3.5 leaves decode 1/4.5 of the GPUs instead of 1/{1 + relaxed:.2f} and keeps "
        f"{(1 + relaxed) / 4.5:.0%}; to keep 95 % the matched ratio would have to be {needed:.2f}, decode "
        f"{needed / relaxed:.2f} times as fast. Decode kernels that overlap perfectly would bring it to {ideal:.2f} (F8), "
        f"and the claim would hold. At the same place relative to the optimum, {high.ratio:.2f} keeps {high.relaxed:.0%} "
        f"and {low.ratio:.2f} {low.relaxed:.0%}. At the tight end a fixed 3.5 keeps at least 1/4.5 = 22 % of the optimum "
        "in any model, since the decode pool alone sets the rate there: the printed fall to 0.05 is a share of the "
        "highest throughput, which is how it is judged"
    )


def why_cpp(m: Measures) -> str:
    """Chunks of equal tokens grow dearer along the prompt; stages of 61 layers are uneven."""
    pricer = m.space.get("R1", PREFILL_HEAVY).perf.pricer
    layout = Layout(tp=1.0, pp=1.0, ep=2.0, dp=2.0, cpp=1.0)
    classes = pricer.breakdown(layout, StepLoad(prefill_seqs=1.0, isl=float(CPP_ISL)))
    attention = classes["mla_prefill"]["seconds"] / sum(c["seconds"] for c in classes.values())
    last = 1.0 + attention
    needed = last * 31 / 32 / (1 / 30.4 - 1 / 32)
    even = 31 / 32 / (1 / 30.4 - 1 / 32)
    whole = m.whole_prompt
    return (
        f"TTFT(PP) = T / PP + (PP - 1) / PP x the last chunk. Attention is {attention:.0%} of a 256k prompt, so the last "
        f"of n equal chunks takes about {last:.1f} T / n, and the paper's 30.4 times needs n = {needed:,.0f} chunks of "
        f"{CPP_ISL / needed:,.0f} tokens ({even:,.0f} of {CPP_ISL / even:,.0f} if chunks are made equally long in time). "
        f"Short chunks cost throughput against a whole prompt ({whole.ttft_s:.0f} s, "
        f"{whole.prompt_tokens_per_s_per_gpu:,.0f} prompt tok/s/GPU at PP 1): the printed 0.99 to 1.03 can only mean the "
        "same chunks at every PP, which is what is judged. 61 layers over 32 stages leave stages of 1 and 2 layers, 5 % "
        "that neither counts"
    )


def why_dynamic(m: Measures) -> str:
    """Throughput goes with means, not medians."""
    trace, *spreads = m.dynamic
    listed = "; ".join(f"{d.name}: P50 {d.p50:.2f}, means {d.mean:.2f}" for d in spreads)
    return (
        "work goes with mean lengths and medians are not means: the trace's shape with P50 4096/512 has means "
        f"{trace.mean_isl:,.0f}/{trace.mean_osl:,.0f}, so prompt tokens for each output token are "
        f"{trace.mean_isl / trace.mean_osl:.2f} instead of 8.00. A constant at the means is within "
        f"{abs(trace.mean - 1):.1%}. Independent lognormal lengths ({listed}) stay within 5 % of the P50 constant up to a "
        "standard deviation of about 0.45 of the logarithm; the real trace has 0.99 and 0.86. The claim holds for narrow "
        "or lucky traffic, and with means in place of medians for all of these but the widest"
    )


def why_transfer(m: Measures) -> str:
    """Ingress cannot exceed memory bandwidth over OSL when decode reads cache only."""
    hardware = m.space.get("R1", PREFILL_HEAVY).sweep.hardware
    bound = hardware.memory_bytes_per_s / MILLION[1]
    return (
        "a decode GPU that reads only cache turns over its sequences every OSL reads, so it takes in at most memory "
        f"bandwidth / OSL = {bound / 1e9:.1f} GB/s, whatever the prompt's length; weights and launches take their share of "
        f"that. The link gives {hardware.scale_out_bytes_per_s / 1e9:.0f} GB/s. Egress of small dense models is the "
        f"highest ({m.needs['8B'].egress / 1e9:.1f} GB/s for 8B): cache per token shrinks more slowly than arithmetic per "
        "token. The printed Equations 1 and 2 lack the factor 2 for K and V; for R1's single latent there is none"
    )


def why_domain(_: Measures) -> str:
    """Why a wider domain cannot lose here."""
    return (
        "by construction: both spaces hold the same points, and a wider domain only replaces slow links by fast ones. "
        "Where it matters is the finding: R1's experts spread beyond 8 GPUs at medium interactivity, Llama-70B's TP "
        "beyond 8 at the tight end only"
    )


def million_token_arithmetic(m: Measures) -> str:
    """Why no 1M-token prompt meets the paper's own 10 s cutoff."""
    swept = m.space.get("R1", MILLION)
    fastest = float(min(swept.space.priced["prefill"].ttft_s))
    isl = MILLION[0]
    flops = 61 * 2.0 * 128 * (192 + 128) * isl**2 / 2 + 2.0 * swept.sweep.model.active_parameters * isl
    peak = swept.sweep.hardware.peak("bf16") * CPP_GPUS
    return (
        f"Figure 12 shows 1M-token prompts, while points above 10 s are said to be left out: {flops:.2e} FLOP (61 layers x "
        f"2 x 128 heads x 320 x ISL^2 / 2 for attention, 2 x active parameters x ISL) are {flops / peak:.0f} s on "
        f"{CPP_GPUS} GPUs at BF16 peak, and the fastest priced instance takes {fastest:.0f} s"
    )


def kv_equation_arithmetic(m: Measures) -> str:
    """Equations 1 and 2 as printed against the bytes that a cache really has."""
    model = m.space.get("70B", PREFILL_HEAVY).sweep.model
    real = model.kv_bytes_per_token(kv="fp8")
    printed = 80 * 128 * 8 * itemsize("fp8")
    return (
        f"Equations 1 and 2 multiply layers, d_head, KV heads and bytes: {printed:,.0f} B a token for Llama-70B in FP8, "
        f"half of the {real:,} B of its keys and values; and bytes_element is described as bytes per token, which the "
        "product already is"
    )
