"""The plane of compression and deployment as figures and rows: bytes, quality proxy, goodput, GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tandem.spec.units import GIB
from tandem.study.joint_claims import Shapes
from tandem.study.joint_space import DEPTHS, Candidate, Cell, Setting, cell_text, cells
from tandem.study.result import Figure, Panel, Series

PROXY = "parameters (B): a proxy of quality"
MIDDLE_S = 0.02
"""The bound on the time per output token of which planes are drawn."""


def plane_rows(models: Mapping[str, Candidate], setting: Setting) -> list[dict[str, Any]]:
    """One row a cell and model that is served there."""
    rows = []
    for cell in cells():
        for title, c in models.items():
            best = c.best(cell)
            if best is None:
                continue
            rows.append(
                {
                    "cell": cell_text(cell),
                    "model": title,
                    "total_bytes": c.total_bytes,
                    "parameters": c.spec.parameters,
                    "mode": best.deployment.mode,
                    "gain": c.gain(cell),
                    "goodput_rps": c.goodput(cell),
                    "tokens_per_s_per_gpu": c.per_gpu(cell),
                    "gpus_for_load": c.gpus_for(cell, setting.load_rps),
                }
            )
    return rows


def shape_row(c: Candidate, setting: Setting) -> dict[str, Any]:
    """A shape in every cell, for claims.json."""
    layers, hidden, ffn, heads = c.key
    texts = {cell: cell_text(cell) for cell in cells()}
    return {
        "layers": layers, "hidden_size": hidden, "ffn_size": ffn, "mamba_heads": heads, "parameters": c.spec.parameters,
        "total_bytes": c.total_bytes, "a10g_tokens_per_s": c.fixed_batch,
        "per_gpu": {text: c.per_gpu(cell) for cell, text in texts.items()},
        "goodput_rps": {text: c.goodput(cell) for cell, text in texts.items()},
        "gpus_for_load": {text: c.gpus_for(cell, setting.load_rps) for cell, text in texts.items()},
        "mode": {text: c.mode(cell) for cell, text in texts.items()},
        "gain": {text: c.gain(cell) for cell, text in texts.items()},
    }  # fmt: skip


def plane(shapes: Shapes, peers: Mapping[str, Candidate], setting: Setting) -> dict[str, Figure]:
    """Bytes against goodput, and the proxy of quality against the GPUs that a load needs; every point says all four."""

    def gpus(c: Candidate, cell: Cell) -> float | None:
        count = c.gpus_for(cell, setting.load_rps)
        return None if count is None else float(count)

    shown = tuple(cell for cell in cells() if cell[2] == MIDDLE_S)
    where = f"{setting.gpus} x {setting.hardware}"
    return {
        "plane": Figure(
            title="The plane: bytes against goodput",
            note="Each point is a shape, or a Transformer of about the 9B's size, with its best deployment; bytes of weights, "
            f"cache and state at 128k tokens, goodput of {where} within the bounds at full load; all bounds: claims.json.",
            x_title="GiB at 128k tokens",
            y_title="requests/s within the bounds",
            panels=_panels(shown, shapes, peers, setting, lambda c: c.total_bytes / GIB, lambda c, cell: c.goodput(cell)),
        ),
        "load": Figure(
            title=f"The plane: proxy of quality against GPUs for {setting.load_rps:g} requests/s",
            note="Parameters order models of one family and training; they are no measure of accuracy, and a Transformer's do "
            "not compare with a hybrid's. GPUs in whole instances of a shape's best deployment; every bound is in claims.json.",
            x_title=PROXY,
            y_title="GPUs",
            panels=_panels(shown, shapes, peers, setting, lambda c: c.spec.parameters / 1e9, gpus),
        ),
    }


def _panels(
    where: Sequence[Cell],
    shapes: Shapes,
    peers: Mapping[str, Candidate],
    setting: Setting,
    x: Callable[[Candidate], float],
    y: Callable[[Candidate, Cell], float | None],
) -> tuple[Panel, ...]:
    groups = {f"{depth} layers": [c for c in shapes.values() if c.key[0] == depth] for depth in DEPTHS}
    groups |= {title: [c] for title, c in peers.items()}
    panels = []
    for cell in where:
        series = []
        for title, group in groups.items():
            there = [(c, value) for c in group if (value := y(c, cell)) is not None]
            series.append(
                Series(
                    name=title,
                    x=[x(c) for c, _ in there],
                    y=[value for _, value in there],
                    text=[_text(c, cell, setting) for c, _ in there],
                    style="markers",
                )
            )
        panels.append(Panel(title=cell_text(cell), series=tuple(series)))
    return tuple(panels)


def _text(c: Candidate, cell: Cell, setting: Setting) -> str:
    return (
        f"{c.spec.name}: {c.spec.parameters / 1e9:.2f} B parameters, {c.total_bytes / GIB:.1f} GiB, "
        f"{c.goodput(cell) or 0.0:.1f} requests/s, {c.per_gpu(cell) or 0.0:,.0f} tokens/s a GPU, "
        f"{c.gpus_for(cell, setting.load_rps)} GPUs for {setting.load_rps:g} requests/s, {c.mode(cell)}"
    )
