"""Pictures of numbers: what prepared data is like."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fastdraft.data.statistics import Statistics
from fastdraft.files import write_file

STYLE = {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False}


def write_data_report(folder: Path | str, numbers: Statistics, draft_vocab_size: int) -> Path:
    """Draws folder/data.png: lengths, trained share, and how much a draft vocabulary of each size holds."""
    with matplotlib.rc_context(STYLE):
        figure, (lengths, share, coverage) = panels(
            "Length of the samples", "Trained share of the samples", "Trained tokens in the vocabulary map"
        )
        lengths.hist(numbers.lengths, bins=np.geomspace(numbers.lengths.min(), numbers.lengths.max() + 1, 41))
        lengths.set(xlabel="tokens", ylabel="samples", xscale="log")
        share.hist(numbers.trained / numbers.lengths, bins=np.linspace(0, 1, 41))
        share.set(xlabel="trained tokens (share)", ylabel="samples")
        held = np.cumsum(np.sort(numbers.counts)[::-1]) / numbers.counts.sum()
        coverage.plot(np.arange(1, len(held) + 1), held)
        for size, covered in numbers.coverage(draft_vocab_size).items():
            coverage.plot([size], [covered], "o", label=f"{size:,}: {covered:.2%}")
        coverage.set(xlabel="draft vocabulary (tokens)", ylabel="coverage (share)", xscale="log", ylim=(0, 1.03))
        coverage.legend(loc="lower right")
        return save(figure, Path(folder) / "data.png")


def panels(*titles: str) -> tuple[Figure, Any]:
    """A figure of panels side by side, and the panels' axes."""
    figure = Figure(figsize=(6 * len(titles), 4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(titles))
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
    return figure, panels


def save(figure: Figure, path: Path) -> Path:
    """The picture, whole or not at all."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_file(path, out.getvalue())
    return path
