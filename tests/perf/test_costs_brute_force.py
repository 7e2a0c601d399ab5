"""Formula against brute force: a slow scalar loop over layers, sequences, chunks and tokens must find the same work.

The loop is written from DESIGN section 4 and facts/paper-a.md section 1.2 and shares no helper with costs.py or ops.py:
it walks `model.layers` one by one, asks every token how many others it sees, and adds up what one GPU does.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.costs import LayerCosts, Layout, StepLoad
from tandem.spec.design import Precision
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, ModelSpec, MoE

BYTES = {"bf16": 2.0, "fp32": 4.0, "fp8": 1.0, "fp8_block": 1.0 + 4 / 16384, "fp4": 4.5 / 8, "mxfp4": 4.25 / 8, "int4": 4.5 / 8}
WEIGHT_ONLY = ("bf16", "int4", "mxfp4")
BF16 = 2.0


@dataclass
class Step:
    """One engine step: `b` sequences decode at context `context`, each with `draft` proposed tokens beside its next one, and
    of each of `prompts` prompts tokens start..stop run."""

    b: int
    context: float
    prompts: int
    start: int
    stop: int
    isl: int
    draft: int = 0

    @property
    def decoding(self) -> int:
        return self.b * (1 + self.draft)

    @property
    def tokens(self) -> int:
        return self.decoding + self.prompts * (self.stop - self.start)


class Tally:
    """FLOPs and bytes of one GPU by operation class, added up one layer of one step at a time."""

    def __init__(self, model: ModelSpec, precision: Precision, p: Layout) -> None:
        self.model, self.q, self.p, self.h = model, precision, p, model.hidden_size
        self.flops: dict[str, float] = defaultdict(float)
        self.moved: dict[str, float] = defaultdict(float)
        sparse = any(isinstance(m, MoE) for m in model.layers)
        self.w = "bf16" if sparse and precision.weights in ("fp4", "mxfp4", "int4") else precision.weights
        self.slices = p.tp * p.dp / p.ep

    def add(self, op: str, flops: float, moved: float) -> None:
        self.flops[op] += flops
        self.moved[op] += moved

    def linear(self, rows: float, n: float, k: float, w: str | None = None) -> None:
        """Every row meets every weight: multiply and add; weights once, inputs once, bf16 results once."""
        w = w or self.w
        a = "bf16" if w in WEIGHT_ONLY else self.q.activations
        self.add("gemm", 2 * rows * n * k, BYTES[w] * n * k + BYTES[a] * rows * k + BF16 * rows * n)

    def ring(self, message: float, n: float) -> None:
        if n > 1:
            self.add("allreduce", 0, message * (n - 1) / n + message * (n - 1) / n)  # reduce-scatter, then all-gather

    def step(self, s: Step) -> None:
        h, tp, stages = self.h, self.p.tp, self.p.pp * self.p.cpp
        for layer in self.model.layers:
            self.add("memory", 0, 5 * BF16 * h * s.tokens)
            getattr(self, type(layer).__name__.lower())(layer, s)
            if not isinstance(layer, MoE):
                self.ring(BF16 * h * s.tokens, tp)
        self.head(s.decoding + (s.prompts if s.stop == s.isl else 0))  # only a finished prompt samples its first token
        for _ in range(s.draft):
            self.propose(s)
        for _ in range(int(stages) - 1):
            self.add("send", 0, BF16 * h * s.tokens)

    def head(self, sampled: float) -> None:
        self.linear(sampled, self.model.vocab_size / self.p.tp, self.h, "bf16")
        self.add("memory", 0, 8 * sampled * self.model.vocab_size / self.p.tp)

    def propose(self, s: Step) -> None:
        """One pass of the drafting layer: joins two hidden states, then the last attention and the last feed-forward layer."""
        alone = Step(s.b, s.context, 0, 0, 0, -1)
        self.linear(s.b, self.h, 2 * self.h)
        for kinds in ((Attention, MLA), (MLP, MoE)):
            last = [m for m, _ in self.model.mixers if isinstance(m, kinds)][-1:]
            for layer in last:
                getattr(self, type(layer).__name__.lower())(layer, alone)
                if not isinstance(layer, MoE):
                    self.ring(BF16 * self.h * s.b, self.p.tp)
        self.head(s.b)

    def attention(self, m: Attention, s: Step) -> None:
        d, tp, kv = m.head_dim, self.p.tp, BYTES[self.q.kv]
        heads, kv_heads = m.num_heads / tp, max(1, m.num_kv_heads / tp)
        query = heads * d * (2 if m.output_gate else 1)
        self.linear(s.tokens, query + 2 * kv_heads * d, self.h)
        for _ in range(s.b):
            seen = s.context if m.window is None else min(s.context, m.window)
            scores = 2 * heads * d * seen
            self.add("attention_decode", 0, kv * 2 * kv_heads * d * seen)  # the cache is read once for all tokens
            for _ in range(1 + s.draft):
                self.add("attention_decode", 2 * scores, 2 * BF16 * heads * d)
        for _ in range(s.prompts):
            for position in range(s.start, s.stop):
                seen = position + 1 if m.window is None else min(position + 1, m.window)
                self.add("attention_prefill", 2 * 2 * heads * d * seen, 2 * BF16 * heads * d)
            prior = s.start if m.window is None else min(s.start, m.window)
            self.add("attention_prefill", 0, kv * 2 * kv_heads * d * (s.stop - s.start + prior))
        self.add("memory", 0, 2 * BF16 * s.tokens * (query + kv_heads * d))
        self.linear(s.tokens, self.h, heads * d)

    def mla(self, m: MLA, s: Step) -> None:
        heads, rank, rope = m.num_heads / self.p.tp, m.kv_lora_rank, m.qk_rope_head_dim
        query, value = m.qk_nope_head_dim + rope, m.v_head_dim
        down = rank + rope + (m.q_lora_rank or 0)
        self.linear(s.tokens, down, self.h)
        self.linear(s.tokens, heads * query, m.q_lora_rank or self.h)
        if s.b:
            self.linear(s.decoding, heads * rank, m.qk_nope_head_dim, "bf16")
            self.linear(s.decoding, heads * value, rank, "bf16")
        for _ in range(s.b):
            flops = 2 * heads * (rank + rope) * s.context + 2 * heads * rank * s.context
            cache = BYTES[self.q.kv] * (rank + rope) * s.context
            self.add("mla_decode", 0, cache)
            for _ in range(1 + s.draft):
                self.add("mla_decode", flops, BF16 * heads * (rank + rope) + BF16 * heads * rank)
        if s.prompts:
            self.linear(s.prompts * s.stop, heads * (m.qk_nope_head_dim + value), rank)  # earlier latents again
        for _ in range(s.prompts):
            for position in range(s.start, s.stop):
                self.add("mla_prefill", 2 * heads * (query + value) * (position + 1), 0)
            rows = (s.stop - s.start) + s.stop  # queries in and results out; keys and values of all tokens so far
            self.add("mla_prefill", 0, BF16 * heads * (query + value) * rows)
        self.add("memory", 0, 2 * BF16 * s.tokens * (down + heads * query))
        self.linear(s.tokens, self.h, heads * value)

    def recurrent(self, s: Step, heads: int, p: int, n: int, groups: float, conv: int, kernel: int, in_width: int) -> None:
        tp = self.p.tp
        heads_here, conv_here = heads / tp, conv / tp
        self.linear(s.tokens, in_width / tp, self.h)
        io = BF16 * (3 * heads_here * p + 2 * groups * n)
        for _ in range(s.b):
            read = written = BYTES[self.q.state] * heads_here * p * n
            self.add("scan_decode", 0, read)
            for _ in range(1 + s.draft):  # the state after each token is kept until it is known which ones hold
                self.add("scan_decode", 6 * heads_here * p * n, written + io)
                self.add("conv_decode", 2 * kernel * conv_here, 2 * BF16 * kernel * conv_here)
        for _ in range(s.prompts):
            new = s.stop - s.start
            for _ in range(new):
                within = 2 * 128 * groups * n + 2 * 128 * heads_here * p
                self.add("scan_prefill", within + 2 * 2 * heads_here * p * n, io)
                self.add("conv_prefill", 2 * kernel * conv_here, 2 * BF16 * conv_here)
            self.add("scan_prefill", 0, 3 * 4 * heads_here * p * n * (new / 128 + 1))
        self.add("memory", 0, 3 * BF16 * s.tokens * heads_here * p)
        self.linear(s.tokens, self.h, heads_here * p)

    def mamba2(self, m: Mamba2, s: Step) -> None:
        inner, bc = m.num_heads * m.head_dim, 2 * m.groups * m.state_dim
        groups = max(1, m.groups / self.p.tp)
        width = 2 * inner + bc + m.num_heads  # z, x, B, C, dt
        self.recurrent(s, m.num_heads, m.head_dim, m.state_dim, groups, inner + bc, m.conv_kernel, width)

    def gateddeltanet(self, m: GatedDeltaNet, s: Step) -> None:
        key, value = m.num_key_heads * m.key_head_dim, m.num_value_heads * m.value_head_dim
        width = 2 * key + 2 * value + 2 * m.num_value_heads  # q, k, v, z, beta, alpha
        groups = m.num_key_heads / self.p.tp
        self.recurrent(s, m.num_value_heads, m.value_head_dim, m.key_head_dim, groups, 2 * key + value, m.conv_kernel, width)

    def mlp(self, m: MLP, s: Step) -> None:
        up = m.ffn_size * (2 if m.gated else 1) / self.p.tp
        self.linear(s.tokens, up, self.h)
        self.add("memory", 0, BF16 * s.tokens * (up + m.ffn_size / self.p.tp))
        self.linear(s.tokens, self.h, m.ffn_size / self.p.tp)

    def moe(self, m: MoE, s: Step) -> None:
        tp, dp, ep = self.p.tp, self.p.dp, self.p.ep
        width, ffn, matrices = m.latent_size or self.h, m.ffn_size / self.slices, 3 if m.gated else 2
        self.linear(s.tokens, m.num_experts, self.h, "bf16")
        if m.latent_size:
            self.linear(s.tokens, m.latent_size, self.h)
            self.linear(s.tokens, self.h, m.latent_size)
        if m.shared_ffn_size:
            self.mlp(MLP(ffn_size=m.shared_ffn_size, gated=m.gated), s)
        a = "bf16" if self.q.weights in WEIGHT_ONLY else self.q.activations
        everyone = s.tokens * dp
        for _ in range(int(m.num_experts / ep)):
            touched = 1 - (1 - m.top_k / m.num_experts) ** everyone
            self.add("moe", 0, touched * matrices * width * ffn * BYTES[self.q.weights])
        visits = everyone * m.top_k / ep
        io = width * (BYTES[a] + BF16) + matrices * ffn * BF16
        self.add("moe", visits * 2 * matrices * width * ffn, visits * io)
        if dp == 1:
            self.ring(BF16 * self.h * s.tokens, tp)
        elif ep == 1:
            self.ring(BF16 * width * everyone, tp * dp)
        else:
            missed = 1.0
            for _ in range(m.top_k):
                missed *= 1 - 1 / ep
            sent = width * s.tokens / tp * (ep * (1 - missed)) * self.slices
            for number in (BYTES[a], BF16):  # there as the experts read it, back in bf16
                self.add("alltoall", 0, number * sent * (tp * dp - 1) / (tp * dp))


def priced(costs: LayerCosts, layout: Layout, load: StepLoad, times: float = 1.0) -> tuple[dict[str, float], dict[str, float]]:
    flops: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    for item in costs.step_items(layout, load):
        flops[item.op] = flops[item.op] + item.work.flops * item.count * times
        moved[item.op] = moved[item.op] + item.work.moved_bytes * item.count * times
    return flops, moved


few = st.integers(1, 3)
heads4 = st.sampled_from([4, 8])
mixers = st.one_of(
    st.builds(
        lambda q, kv, d, w, g: Attention(num_heads=q, num_kv_heads=kv, head_dim=d, window=w, output_gate=g),
        heads4, st.sampled_from([1, 2, 4]), st.sampled_from([4, 16]), st.none() | st.integers(1, 60), st.booleans(),
    ),
    st.builds(
        MLA, num_heads=heads4, q_lora_rank=st.none() | st.just(24), kv_lora_rank=st.sampled_from([8, 20]),
        qk_nope_head_dim=st.just(6), qk_rope_head_dim=st.sampled_from([2, 4]), v_head_dim=st.sampled_from([6, 10]),
    ),
    st.builds(
        Mamba2, num_heads=heads4, head_dim=st.sampled_from([4, 10]), state_dim=st.sampled_from([8, 16]),
        groups=st.sampled_from([1, 2, 4]), conv_kernel=st.sampled_from([2, 4]),
    ),
    st.builds(
        GatedDeltaNet, num_key_heads=st.just(4), key_head_dim=st.sampled_from([4, 6]), num_value_heads=heads4,
        value_head_dim=st.sampled_from([4, 10]),
    ),
    st.builds(MLP, ffn_size=st.sampled_from([40, 64]), gated=st.booleans()),
    st.builds(
        MoE, num_experts=st.sampled_from([8, 16]), top_k=st.integers(1, 8), ffn_size=st.sampled_from([16, 48]),
        gated=st.booleans(), shared_ffn_size=st.sampled_from([0, 24]), latent_size=st.none() | st.just(12),
    ),
)  # fmt: skip
models = st.builds(
    lambda layers, h, v: ModelSpec(name="toy", vocab_size=v, hidden_size=h, layers=tuple(layers)),
    st.lists(mixers, min_size=1, max_size=5), st.sampled_from([16, 40]), st.sampled_from([64, 100]),
)  # fmt: skip
precisions = st.sampled_from(["bf16", "fp8", "fp8_block", "fp4", "mxfp4", "int4", "bf16/bf16/fp8"]).map(Precision.parse)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    ep = draw(st.sampled_from([e for e in (1, 2, 4, 8) if (tp * dp) % e == 0]))
    pp = draw(few)
    return Layout(*(float(x) for x in (tp, pp, ep, dp, draw(few) if pp == 1 else 1)))


def assert_same(
    model: ModelSpec, precision: Precision, layout: Layout, load: StepLoad, steps: list[Step], loose: str = ""
) -> None:
    tally = Tally(model, precision, layout)
    for step in steps:
        tally.step(step)
    flops, moved = priced(LayerCosts(model, precision), layout, load, len(steps))
    for op in set(tally.flops) | set(flops):
        assert flops[op] == pytest.approx(tally.flops[op], rel=1e-9, abs=1e-9), op
        if op != loose:
            assert moved[op] == pytest.approx(tally.moved[op], rel=1e-9, abs=1e-9), op


@settings(max_examples=150, deadline=None)
@given(models, precisions, layouts(), st.integers(1, 40), st.integers(1, 200), st.integers(0, 3))
def test_decode_equals_the_loop(model: ModelSpec, q: Precision, layout: Layout, b: int, context: int, draft: int) -> None:
    load = StepLoad(decode_seqs=float(b), context=float(context), draft=float(draft))
    assert_same(model, q, layout, load, [Step(b, context, 0, 0, 0, -1, draft)])


@settings(max_examples=150, deadline=None)
@given(
    models,
    precisions,
    layouts(),
    st.integers(0, 9),
    st.integers(1, 90),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_prefill_equals_the_loop_over_chunks_and_tokens(
    model: ModelSpec, q: Precision, layout: Layout, b: int, context: int, prompts: int, chunks: int, new: int
) -> None:
    """Whole (one chunk), chunked, and mixed with decoding sequences; `chunks` equal chunks are as many engine steps."""
    isl = chunks * new
    load = StepLoad(float(b), float(context), float(prompts), float(isl), float(chunks))
    steps = [Step(b, context, prompts, i * new, (i + 1) * new, isl) for i in range(chunks)]
    windowed = chunks > 1 and any(isinstance(m, Attention) and m.window for m in model.layers)
    # Keys that a windowed chunk re-reads are taken at the mean prefix: see the bound below.
    assert_same(model, q, layout, load, steps, loose="attention_prefill" if windowed else "")
