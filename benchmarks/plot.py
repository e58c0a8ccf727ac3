"""Draws the table of `compare`: a bar per arm for steady state and the whole process, and the limit as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import Line

COLOURS = {"ours": "#1b7837", "as it comes": "#7f7f7f", "our network": "#4c78a8"}


def draw(lines: Sequence[Line], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "compare"  # the same table gives the same file
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(line.model for line in lines))
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, [line for line in lines if line.model == model], model)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _panel(axis: Any, lines: Sequence[Line], model: str) -> None:
    arms = [line for line in lines if line.kind in COLOURS][::-1]
    for place, line in enumerate(arms):
        colour = COLOURS[line.kind]
        axis.barh(place + 0.2, line.steady, 0.38, color=colour)
        axis.barh(place - 0.2, line.whole, 0.38, color=colour, alpha=0.45)
        axis.text(line.steady, place + 0.2, f" {line.steady:.0f}", va="center", fontsize=8)
        axis.text(line.whole, place - 0.2, f" {line.whole:.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(arms)), [line.arm for line in arms], fontsize=8)
    for line in lines:
        if line.kind == "limit" and line.arm.startswith("both"):
            axis.axvline(line.steady, color="black", linestyle="--", linewidth=1)
            axis.text(line.steady, len(arms) - 0.4, "limit", ha="center", fontsize=8)
    axis.set_xlabel(f"{model}: images/s; dark: steady state, light: from start to exit", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
