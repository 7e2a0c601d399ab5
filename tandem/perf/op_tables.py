"""Reads the public operator measurements of `aiconfigurator-core`: one table -> (Work, seconds) for each number format.

Kernel timings of NVIDIA's Apache-2.0 package, one parquet file for each (GPU, kind, backend, version). What the columns
mean was found by dividing the implied FLOP/s and bytes/s by the GPU's peaks, and `check_rates` repeats that division
on every table that is read:

- `latency` is milliseconds, but microseconds in `moe_a2a_perf`; a message is counted in elements, not bytes.
- Attention: heads are those of one GPU (`tp_size` is a label). Decode: `isl` is 1, the context is `step` + 1 tokens, at
  most `window_size` (0 = none). Prefill: `isl` new tokens after `step` cached ones. Multi-head latent attention is
  DeepSeek-V3's (latent 512, rotary 64, up-projected query and key 192, value 128).
- Mixture of experts: `num_tokens` are those of all expert groups, `inter_size` the width before `moe_tp_size` divides it;
  the group with most work was timed, so imbalance is part of the fit. Up to 8 groups the realistic token distribution
  is read, power_law_1.2; beyond, the balanced one: there the busiest group would have 2 to 16 times the mean work, which
  is why such deployments replicate their popular experts.
- Expert all-to-all: `num_tokens` are those of one GPU, which sends one copy of a token to each expert group that it picked
  (`ops.distinct_groups`). DeepEP's kernels are read in bf16. On GB200 the kernels over the NVLink domain were measured
  too, 2 to 64 GPUs and every format; GB300, whose links are the same, takes them as well.
- `scan_*` are the gated delta rule's kernels (Qwen3.5) that stream their chunk states through memory, as Mamba-2's do.
  Of Mamba-2 these tables hold the convolution alone. Left out: FlashInfer's fused scan, whose states stay on the chip,
  and decode kernels that are not packed, which move less than a whole fp32 state.
- `memory` is the per-tensor FP8 quantisation pass (2 bytes read, 1 written), `send` half an NCCL all-to-all of 2 GPUs.

A shape measured by several versions of one backend counts once, with the newest; by several kernels of that version,
with the fastest. Backends are pooled. Collectives take the fastest of all backends for each (GPUs, size).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf import ops
from tandem.perf.ops import OpClass, Work
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.units import itemsize

Columns = dict[str, Any]
MISSING = "reading operator tables needs an extra: pip install 'tandem-lm[calibrate]'"

_DTYPES = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "fp4",
    "w4a16_mxfp4": "mxfp4",
    "int4_wo": "int4",
}
"""The package's names of number formats -> ours. Mixed formats that Tandem does not price (w4a8) are left out."""

_MLA_LATENT, _MLA_ROPE, _MLA_QK, _MLA_V = 512, 64, 192, 128
_UNGATED = ((2688, 1856), (1024, 2688), (4096, 2688), (2048, 5120), (8192, 5120))
"""(hidden, expert width) of the Nemotron-H models, whose experts have two matrices instead of three."""

_NVLINK_DOMAIN = {"gb300": "gb200"}
"""GPUs whose NVLink-domain kernels were measured on another one with the same links."""

_MIN_CONTEXT, _MAX_GROUP = 255, 48
_LARGE_S = 1e-4
_REACHED = (0.01, 1.05)


class OpTable(NamedTuple):
    """Measurements of one operation in one format: what the GPU had to do, and the seconds it took."""

    system: str
    op: OpClass
    dtype: str
    name: str
    work: Work
    seconds: NDArray[np.float64]


class _Part(NamedTuple):
    """The rows of a file that belong to one operation and format."""

    op: OpClass
    dtype: str
    rows: NDArray[np.bool_]
    work: Work


def extra(module: str) -> Any:
    """An optional dependency, imported when it is needed; without it, an error that says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise TandemError(MISSING) from None


def read_tables(systems_dir: Path, system: str) -> Iterator[OpTable]:
    """Every usable table of `system` (the package's name, such as `h100_sxm`) under `systems_dir/data`."""
    root = systems_dir / "data" / system
    if not root.is_dir():
        known = sorted(p.name for p in (systems_dir / "data").glob("*/"))
        raise SpecError(f"system={system!r}: no operator tables; there are {', '.join(known) or 'none'}")
    for kind, file, to_parts in _SOURCES:
        for backend in _backends(root / kind):
            columns = _newest_rows(backend, file)
            if not columns:
                continue
            name = f"{system}/{kind}/{backend.name}/{file}"
            seconds = columns["latency"].astype(float) * 1e-3
            for part in to_parts(columns):
                rows = part.rows & (seconds > 0)
                if rows.any():
                    yield OpTable(system, part.op, part.dtype, name, _pick(part.work, rows), seconds[rows])
    yield from _elementwise(root, system)
    yield from _collectives(root, system)


def ideal_s(table: OpTable, flops_per_s: float, bytes_per_s: float) -> NDArray[np.float64]:
    """Seconds that the peaks alone allow for each row."""
    return np.maximum(np.asarray(table.work.flops) / flops_per_s, np.asarray(table.work.moved_bytes) / bytes_per_s)


def check_rates(table: OpTable, flops_per_s: float, bytes_per_s: float) -> float:
    """The share of the peaks that large shapes reach; a table is refused where that cannot be: its units are not ours.

    Large: the peaks alone need 100 us or more (small shapes may sit in a cache), or the largest twentieth if none does.
    """
    ideal = ideal_s(table, flops_per_s, bytes_per_s)
    large = ideal >= min(_LARGE_S, float(np.quantile(ideal, 0.95)))
    reached = float(np.median(ideal[large] / table.seconds[large]))
    low, high = _REACHED
    if not low <= reached <= high:
        raise TandemError(
            f"{table.name} ({table.op}, {table.dtype}): its large shapes reach {reached:.3g} of the peak, which cannot be "
            f"(possible: {low} to {high}); its units changed, or its shapes fit in a cache"
        )
    return reached


def _pick(work: Work, rows: NDArray[np.bool_]) -> Work:
    return Work(*(np.broadcast_to(np.asarray(x, float), rows.shape)[rows] for x in work))


def _read(path: Path) -> Columns:
    table = extra("pyarrow.parquet").ParquetFile(path).read()
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _backends(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_dir())


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", folder.name))


_NOT_SHAPE = frozenset({"latency", "kernel_source", "kernel_source_hash", "framework", "version", "device"})


def _newest_rows(backend: Path, file: str) -> Columns:
    """All versions of a file joined; of equal shapes only the newest version's fastest row stays. Empty: no such file."""
    paths = sorted(backend.glob(f"*/{file}"), key=lambda p: _version(p.parent), reverse=True)
    parts = [_read(path) for path in paths]
    if not parts:
        return {}
    for part in parts:
        part.setdefault("window_size", np.zeros(len(part["latency"]), int))
    shared = [name for name in parts[0] if all(name in part for part in parts)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in shared}
    age = np.repeat(np.arange(len(parts)), [len(part["latency"]) for part in parts])
    keys = [np.unique(joined[name], return_inverse=True)[1] for name in shared if name not in _NOT_SHAPE]
    if "kernel_source" in joined:
        keys.append(np.unique(_kernel_family(joined), return_inverse=True)[1])
    order = np.lexsort((joined["latency"], age, *keys))
    ordered = np.stack([key[order] for key in keys])
    first = np.ones(len(order), bool)
    first[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    keep = np.sort(order[first])
    return {name: column[keep] for name, column in joined.items()}


def _kernel_family(columns: Columns) -> NDArray[Any]:
    """What a kernel computes and how it was launched, where one file mixes that: `conv`, `eager`, or nothing special."""
    kernels = columns["kernel_source"].astype(str)
    families = [np.char.find(kernels, word) >= 0 for word in ("conv1d", "eager")]
    return np.select(families, ["conv", "eager"], "")


def _formats(column: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for theirs, ours in _DTYPES.items():
        yield ours, column == theirs


def _gemm(c: Columns) -> Iterator[_Part]:
    for dtype, rows in _formats(c["gemm_dtype"]):
        yield _Part("gemm", dtype, rows, ops.gemm(c["m"], c["n"], c["k"], itemsize(dtype), itemsize(dtype)))


def _attention_rows(c: Columns, arithmetic: str) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Rows by cache format; arithmetic in bf16, or in fp8 where this cache format has no bf16 rows."""
    for dtype, cached in _formats(c["kv_cache_dtype"]):
        plain = cached & (c[arithmetic] == "bfloat16")
        yield dtype, plain if plain.any() else cached


def _attention_prefill(c: Columns) -> Iterator[_Part]:
    for dtype, rows in _attention_rows(c, "attn_dtype"):
        for window in np.unique(c["window_size"]):
            work = ops.attention_prefill(
                c["batch_size"], c["isl"], c["step"], c["num_heads"], c["num_key_value_heads"], c["head_dim"],
                itemsize(dtype), int(window) or None,
            )  # fmt: skip
            yield _Part("attention_prefill", dtype, rows & (c["window_size"] == window), work)


def _attention_decode(c: Columns) -> Iterator[_Part]:
    window = np.where(c["window_size"] > 0, c["window_size"], np.iinfo(np.int64).max)
    context = np.minimum(c["step"] + 1, window)
    served = (c["step"] >= _MIN_CONTEXT) & (c["num_heads"] < _MAX_GROUP * c["num_key_value_heads"])
    for dtype, rows in _attention_rows(c, "attn_dtype"):
        work = ops.attention_decode(
            c["batch_size"], context, c["num_heads"], c["num_key_value_heads"], c["head_dim"], itemsize(dtype)
        )
        yield _Part("attention_decode", dtype, rows & served, work)


def _mla_prefill(c: Columns) -> Iterator[_Part]:
    work = ops.mla_prefill(c["batch_size"], c["isl"], c["step"], c["num_heads"], _MLA_QK, _MLA_V)
    for dtype, rows in _attention_rows(c, "mla_dtype"):
        yield _Part("mla_prefill", dtype, rows, work)


def _mla_decode(c: Columns) -> Iterator[_Part]:
    for dtype, rows in _attention_rows(c, "mla_dtype"):
        work = ops.mla_decode(c["batch_size"], c["step"] + 1, c["num_heads"], _MLA_LATENT, _MLA_ROPE, itemsize(dtype))
        yield _Part("mla_decode", dtype, rows, work)


def _moe(c: Columns) -> Iterator[_Part]:
    realistic = c["distribution"] == np.where(c["moe_ep_size"] > 8, "balanced", "power_law_1.2")
    gated = np.ones(len(realistic), bool)
    for hidden, width in _UNGATED:
        gated &= (c["hidden_size"] != hidden) | (c["inter_size"] != width)
    ffn = c["inter_size"] / c["moe_tp_size"]
    for dtype, rows in _formats(c["moe_dtype"]):
        w, a = itemsize(dtype), 2.0 if dtype in ("mxfp4", "int4") else itemsize(dtype)
        for has_gate in (True, False):
            work = ops.moe(
                c["num_tokens"].astype(float), c["hidden_size"], ffn, c["topk"], c["num_experts"], c["moe_ep_size"], w, a,
                gated=has_gate,
            )  # fmt: skip
            yield _Part("moe", dtype, rows & realistic & (gated == has_gate), work)


def _recurrence(c: Columns) -> Iterator[_Part]:
    """The gated delta rule's and Mamba-2's kernels; fp32 state, so that a step reads and writes 8 bytes a number."""
    conv, decode = _kernel_family(c) == "conv", c["phase"] == "generation"
    kernels = c["kernel_source"].astype(str)
    streamed, packed = np.char.find(kernels, "flashinfer") < 0, np.char.find(kernels, "packed") >= 0
    if "num_v_heads" in c:
        heads, head_dim, state_dim, groups = c["num_v_heads"], c["head_v_dim"], c["head_k_dim"], c["num_k_heads"]
    else:
        heads, head_dim, state_dim, groups = c["nheads"], c["head_dim"], c["d_state"], c["n_groups"]
    channels, kernel = heads * head_dim + 2 * groups * state_dim, c["d_conv"]
    seqs, tokens = c["batch_size"].astype(float), c["num_tokens"].astype(float)
    yield _Part("conv_prefill", "bf16", conv & ~decode, ops.conv(tokens, channels, kernel))
    yield _Part("conv_decode", "bf16", conv & decode, ops.conv_update(seqs, channels, kernel))
    work = ops.scan_prefill(tokens, seqs, heads, head_dim, state_dim, groups)
    yield _Part("scan_prefill", "bf16", ~conv & ~decode & streamed, work)
    work = ops.scan_decode(seqs, heads, head_dim, state_dim, groups, itemsize("fp32"))
    yield _Part("scan_decode", "bf16", ~conv & decode & packed, work)


_SOURCES: tuple[tuple[str, str, Callable[[Columns], Iterable[_Part]]], ...] = (
    ("gemm", "gemm_perf.parquet", _gemm),
    ("attention", "context_attention_perf.parquet", _attention_prefill),
    ("attention", "generation_attention_perf.parquet", _attention_decode),
    ("mla", "context_mla_perf.parquet", _mla_prefill),
    ("mla", "generation_mla_perf.parquet", _mla_decode),
    ("moe", "moe_perf.parquet", _moe),
    ("linear_attention", "gdn_perf.parquet", _recurrence),
    ("linear_attention", "mamba2_perf.parquet", _recurrence),
)
"""Folder, file and reader of every kernel table."""


def _elementwise(root: Path, system: str) -> Iterator[OpTable]:
    """One pass over memory: the fastest backend for each shape (SGLang's kernel is 9 times slower than the others')."""
    passes = []
    for backend in _backends(root / "quantize"):
        c = _newest_rows(backend, "scale_matrix_perf.parquet")
        if c:
            none = np.zeros(len(c["m"]))
            message = 3.0 * c["m"] * c["k"]
            passes.append({"phase": none, "gpus": none, "message": message, "seconds": c["latency"] * 1e-3})
    if passes:
        _, moved, seconds = _fastest(passes)
        yield OpTable(system, "memory", "bf16", f"{system}/quantize", ops.memory(moved), seconds)


def _collectives(root: Path, system: str) -> Iterator[OpTable]:
    """All-reduce, all-to-all and point-to-point: the fastest backend for each shape."""
    comm = root / "comm"
    backends = _backends(comm)
    nccl = _newest_rows(comm / "nccl", "nccl_perf.parquet")
    reduced: list[Columns] = []
    for backend in backends:
        c = _newest_rows(backend, "custom_allreduce_perf.parquet")
        if c:
            reduced.append(_messages(c, (_kernel_family(c) != "eager") & (c["allreduce_dtype"] == "bfloat16")))
    if nccl:
        reduced.append(_messages(nccl, (nccl["op_name"] == "all_reduce") & (nccl["nccl_dtype"] == "half")))
    if reduced:
        gpus, message, seconds = _fastest(reduced)
        yield OpTable(system, "allreduce", "bf16", f"{system}/comm/*allreduce*", ops.allreduce(message, gpus), seconds)

    experts = [_expert_messages(c) for b in backends if (c := _newest_rows(b, "moe_a2a_perf.parquet"))]
    domain = root.parent / _NVLINK_DOMAIN.get(system, system) / "comm"
    experts += [_domain_messages(c) for b in _backends(domain) if (c := _newest_rows(b, "trtllm_alltoall_perf.parquet"))]
    swapped = [_messages(nccl, (nccl["op_name"] == "alltoall") & (nccl["nccl_dtype"] == "half"))] if nccl else []
    if experts or swapped:
        gpus, message, seconds = _fastest(experts or swapped)
        yield OpTable(system, "alltoall", "bf16", f"{system}/comm/*a2a*", ops.alltoall(message, gpus), seconds)
    if swapped:
        gpus, message, seconds = _fastest(swapped)
        pair = gpus == 2
        yield OpTable(system, "send", "bf16", f"{system}/comm/nccl", ops.send(message[pair] / 2), seconds[pair])


def _messages(c: Columns, rows: NDArray[np.bool_]) -> Columns:
    """Collectives on 2-byte numbers: the shape, the message in bytes and the seconds."""
    message = c["message_size"][rows] * ops.OUT
    return {
        "phase": np.zeros(len(message)),
        "gpus": c["num_gpus"][rows],
        "message": message,
        "seconds": c["latency"][rows] * 1e-3,
    }


def _expert_messages(c: Columns) -> Columns:
    """Dispatch and combine of bf16 tokens inside one NVLink domain. `default` is bf16: both directions take as long."""
    rows = np.isin(c["comm_dtype"], ("bfloat16", "default")) & (c["node_num"] == 1)
    copies = ops.distinct_groups(c["topk"].astype(float), c["ep_size"].astype(float))
    message = (ops.OUT * c["num_tokens"] * copies * c["hidden_size"])[rows]
    return {
        "phase": (c["phase"][rows] == "combine").astype(float),
        "gpus": c["ep_size"][rows],
        "message": message,
        "seconds": c["latency"][rows] * 1e-6,
    }


def _domain_messages(c: Columns) -> Columns:
    """Dispatch (in the format named) and combine (bf16) of the kernels that address a whole NVLink domain."""
    dispatch, combine = c["op_name"] == "alltoall_dispatch", c["op_name"] == "alltoall_combine"
    rows = dispatch | combine
    number_bytes = np.full(len(rows), ops.OUT)
    for name, dtype in _DTYPES.items():
        number_bytes[dispatch & (c["moe_dtype"] == name)] = itemsize(dtype)
    copies = ops.distinct_groups(c["topk"].astype(float), c["moe_ep_size"].astype(float))
    return {
        "phase": combine[rows].astype(float),
        "gpus": c["moe_ep_size"][rows],
        "message": (number_bytes * c["num_tokens"] * copies * c["hidden_size"])[rows],
        "seconds": c["latency"][rows] * 1e-3,
    }


def _fastest(parts: list[Columns]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(GPUs, message bytes, seconds) with the smallest seconds of each (phase, GPUs, message)."""
    shape = np.stack([np.concatenate([p[name] for p in parts]) for name in ("phase", "gpus", "message")])
    seconds = np.concatenate([p["seconds"] for p in parts])
    order = np.lexsort((seconds, *shape))
    shape, seconds = shape[:, order], seconds[order]
    first = np.ones(len(order), bool)
    first[1:] = (shape[:, 1:] != shape[:, :-1]).any(axis=0)
    return shape[1, first], shape[2, first], seconds[first]
