"""What FP8 costs here, in exactness and in time: errors of a linear's three products, and how long they and a step take.

Errors are of the norm, against fp64, of a linear of 1024 to 1024 over 1024 tokens with normal weights, inputs and gradients; in
the second line of each kind one input in 1024, the same for all tokens, is 100 times as large. Times are medians of rounds in
which all formats take turns, with torch's threads as they are: what matters are the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

ALLOCATOR = {  # without these glibc returns large temporaries to the system each time
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from tandem.model.hybrid import Decoder  # noqa: E402
from tandem.model.linear import Linear  # noqa: E402
from tandem.model.precision import cpu_has_fast_bf16  # noqa: E402
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer  # noqa: E402
from tandem.spec.model import ModelSpec  # noqa: E402
from tandem.train.fp8 import BLOCKWISE, CURRENT_SCALING, E5M2, Fp8Recipe, round_trip  # noqa: E402
from tandem.train.precision import Bf16Linear, Fp8Linear, apply_precision, multiply_bf16  # noqa: E402
from tandem.train.recipe import PrecisionPart  # noqa: E402

KINDS: dict[str, Fp8Recipe | None] = {
    "fp32": None,
    "bf16": None,
    "fp8 blocks": BLOCKWISE,
    "fp8 blocks, scales 2^n": Fp8Recipe(power_of_two=True),
    "fp8 blocks, E5M2 gradients": Fp8Recipe(gradients=E5M2),
    "fp8 a scale a tensor, E5M2 gradients": CURRENT_SCALING,
}
STEPS = ("fp32", "bf16", "fp8-block", "fp8-tensor")


def linear(kind: str, width: int, rows: int) -> Linear:
    recipe = KINDS[kind]
    layer = (
        Fp8Linear(width, rows, bias=False) if recipe else (Bf16Linear if kind == "bf16" else Linear)(width, rows, bias=False)
    )
    with torch.no_grad():
        layer.weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(0))
    if isinstance(layer, Fp8Linear) and recipe:
        layer.recipe = recipe
    return layer


def errors(kind: str, outlier: float) -> dict[str, float]:
    """Percent of the norm, by product."""
    layer, generator = linear(kind, 1024, 1024), torch.Generator().manual_seed(1)
    x, grad = torch.randn(1024, 1024, generator=generator), torch.randn(1024, 1024, generator=generator)
    x[:, 7] *= outlier
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    xd, wd, gd = (t.detach().double() for t in (x, layer.weight, grad))
    found = {"forward": (y, xd @ wd.T), "dgrad": (x.grad, gd @ wd), "wgrad": (layer.weight.grad, gd.T @ xd)}
    return {name: 100 * float((a.detach().double() - b).norm() / b.norm()) for name, (a, b) in found.items()}


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(took) for name, took in seconds.items()}


def linear_step(kind: str, tokens: int, width: int, rows: int) -> Callable[[], object]:
    layer = linear(kind, width, rows)
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, rows)

    def run() -> None:
        layer(x).backward(grad)
        x.grad = layer.weight.grad = None

    return run


def parts(tokens: int, width: int, rows: int) -> dict[str, Callable[[], object]]:
    x, w = torch.randn(tokens, width), torch.randn(width, rows)
    pieces = [(x[:, k : k + 128].contiguous(), w[k : k + 128]) for k in range(0, width, 128)]

    def block_by_block() -> Tensor:
        y = torch.zeros(tokens, rows)
        for a, b in pieces:
            y.addcmul_(multiply_bf16(a, b, rounded=True), a[:, :1])
        return y

    return {
        "copy of the input": x.clone,
        "rounding, tiles along rows": lambda: round_trip(x, (1, 128)),
        "rounding, tiles along columns": lambda: round_trip(x, (128, 1)),
        "product in fp32": lambda: x @ w,
        "product in bf16": lambda: multiply_bf16(x, w),
        "bf16 products of 128, scaled and added": block_by_block,
    }


def model_step(linears: str) -> Callable[[], object]:
    """Forward and backward of the nano hybrid, 8 sequences of 512."""
    mixers: dict[str, Mixer] = {
        "M": Mamba2(num_heads=12, head_dim=32, state_dim=64, groups=2, conv_kernel=4, conv_bias=True, proj_bias=False),
        "*": Attention(num_heads=6, num_kv_heads=2, head_dim=32),
        "-": MLP(ffn_size=768, gated=False),
    }
    layers = tuple(mixers[letter] for letter in "M-M-M*-M-M*-")
    spec = ModelSpec(name="nano", hidden_size=192, vocab_size=1536, layers=layers, norm_eps=1e-5, tied_embeddings=False)
    model = Decoder(spec, seed=0)
    apply_precision(model, PrecisionPart(linears=linears))  # type: ignore[arg-type]
    ids = torch.randint(0, 1536, (8, 512), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        logits = model(ids)[:, :-1].flatten(0, 1)
        functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--times-only", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", end="")
    print(f", bf16 in hardware: {'yes' if cpu_has_fast_bf16() else 'no'}\n")
    figures: dict[str, object] = {}
    if not options.times_only:
        print(f"{'error, % of the norm':42s} outlier  forward    dgrad    wgrad")
    for kind in () if options.times_only else KINDS:
        for outlier in (1.0, 100.0):
            found = errors(kind, outlier)
            figures[f"error, {kind}, outlier {outlier:.0f}"] = found
            print(f"{kind:42s} {outlier:7.0f}" + "".join(f"{found[name]:9.3f}" for name in ("forward", "dgrad", "wgrad")))
    for width, rows in ((192, 768), (768, 192)):
        runs = {kind: linear_step(kind, 4096, width, rows) for kind in KINDS}
        show(f"linear, 4096 tokens, {width} to {rows}, forward and backward", in_turns(runs, options.rounds), figures)
        show(f"parts, 4096 tokens, {width} to {rows}", in_turns(parts(4096, width, rows), options.rounds), figures, None)
    show("nano hybrid, 4096 tokens, forward and backward", in_turns({k: model_step(k) for k in STEPS}, options.rounds), figures)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


def show(title: str, seconds: dict[str, float], figures: dict[str, object], against: str | None = "bf16") -> None:
    print(f"\n{title}")
    figures[title] = seconds
    for name, took in seconds.items():
        ratio = "" if against is None else f"{took / seconds[against]:8.2f} x {against}"
        print(f"{name:42s} {1e3 * took:8.2f} ms{ratio}")


if __name__ == "__main__":
    main()
