"""The figures of a study as SVG files for docs/, from the claims.json that `tandem study ... --out` wrote.

python benchmarks/pretraining_figures.py out/study-pretraining/claims.json docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "tandem", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}

from matplotlib import pyplot  # noqa: E402

COLOURS = ("#2f9e62", "#c23b62", "#1f9bb5", "#8a6d3b", "#d6a419", "#5b3a8c", "#6c6c75", "#e58aa5")
STYLES = {"line": "-", "dash": "--"}


def draw(figure: dict[str, Any], target: Path) -> None:
    """One figure, its panels side by side."""
    panels = figure["panels"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    named = bool(figure["x_labels"])
    sheet, axes = pyplot.subplots(
        rows, columns, figsize=((8.4 if named else 4.2) * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    colours: dict[str, str] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for series in panel["series"]:
            colour = colours.setdefault(series["role"] or series["name"], COLOURS[len(colours) % len(COLOURS)])
            plain = series["style"] == "markers"
            axis.plot(
                series["x"],
                series["y"],
                label=series["name"],
                color=colour,
                linewidth=0.8 if series["style"] == "dash" else 1.4,
                linestyle="" if plain else STYLES[series["style"]],
                marker="D" if plain else None,
                markersize=4,
            )
        axis.set(title=panel["title"], xlabel=figure["x_title"], ylabel=figure["y_title"])
        if figure["x_log"]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({x for series in panel["series"] for x in series["x"]}))
            axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
        if named:
            axis.set_xticks(range(len(figure["x_labels"])), figure["x_labels"], rotation=15)
        axis.grid(alpha=0.25)
        handles, labels = axis.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if named else {}
        axis.legend(once.values(), once.keys(), frameon=False, fontsize=8, **beside)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    sheet.savefig(target, metadata={"Date": None, "Creator": None})
    pyplot.close(sheet)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    data, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in data["figures"].items():
        draw(figure, folder / f"{data['study']}-{name}.svg")
        print(folder / f"{data['study']}-{name}.svg")


if __name__ == "__main__":
    main()
