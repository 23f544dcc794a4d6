"""What the demo has to show at its end: summary.json, a closing table, and report.png of its run's curves.

The summary is one flat dict. Needed:
    accepted_length            tokens per verifying target forward in real decoding, with the trained draft
    accepted_length_untrained  the same with the draft as it was before training
    tau_sim, step_acceptance   held-out, teacher-forced: simulated accepted length, acceptance of each TTT step
    tokens_per_s               packed training tokens per second
    seconds_total, export_dir  wall clock of everything; where the serving checkpoint is
Shown when there:
    accepted_length_chain      when accepted_length is of a tree: with a chain of as many steps
    decode_step_acceptance     share of a chain's decoding rounds that kept a drafted token at depth 1, 2, ...
    step_top1                  held-out top-1 agreement of each TTT step: what greedy decoding accepts
    decode_tokens_per_s, plain_tokens_per_s   decoding speed with the draft and by the target alone
    dtype                      what was computed in, and why
    cut                        what was left out for lack of time, a phrase each
    decode_sample              [[text, round], ...]: decoded pieces in order and the target forward each came from;
                               round null for the prompt
Every other number of a run is in metrics.jsonl and TensorBoard.
"""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdraft.data.picture import STYLE, panels, save
from fastdraft.files import write_file
from fastdraft.metrics import read_metrics

REQUIRED = (
    "accepted_length",
    "accepted_length_untrained",
    "tau_sim",
    "step_acceptance",
    "tokens_per_s",
    "seconds_total",
    "export_dir",
)
FORWARD_COLORS = ("cyan", "yellow")  # of neighbouring forwards' tokens in the decoded sample


def write_summary(run_dir: Path | str, summary: dict[str, Any]) -> Path:
    """Writes run_dir/summary.json, whole or not at all. Raises ValueError naming the keys that are missing."""
    _check(summary)
    path = Path(run_dir) / "summary.json"
    write_file(path, (json.dumps(_jsonable(summary), indent=2, allow_nan=False) + "\n").encode())
    return path


def write_report(run_dir: Path | str, summary: dict[str, Any]) -> Path:
    """Draws run_dir/report.png from metrics.jsonl and the summary: loss, acceptance, and the draft at its end.

    Raises ValueError when metrics.jsonl or a needed key of the summary is missing.
    """
    _check(summary)
    records = read_metrics(run_dir)
    with matplotlib.rc_context(STYLE):
        figure, (loss, acceptance, depth) = panels("Loss", "Acceptance by TTT step", "The final draft, depth by depth")
        _draw_loss(loss, records)
        _draw_acceptance(acceptance, records)
        _draw_depths(depth, summary)
        return save(figure, Path(run_dir) / "report.png")


def render_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the closing table of a run. Raises ValueError naming the keys that are missing."""
    _check(summary)
    table = Table(title="fastdraft: what this run reached", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _facts(summary):
        table.add_row(name, value)
    console.print(table, markup=False)
    if s := summary.get("decode_sample"):
        console.print(_sample(s))


def _facts(s: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's rows, for the console and the page."""
    rows = [
        ("accepted length, before training", f"{_number(s['accepted_length_untrained'])} tokens per target forward"),
        ("accepted length, after", f"{_number(s['accepted_length'])} tokens per target forward"),
        *([("the same as a chain", _number(s["accepted_length_chain"]))] if "accepted_length_chain" in s else []),
        ("tau_sim, held-out", _number(s["tau_sim"])),
        ("acceptance by step, teacher-forced", _shares(s["step_acceptance"])),
    ]
    if "decode_step_acceptance" in s:
        rows.append(("kept by depth, decoding a chain", _shares(s["decode_step_acceptance"])))
    if "decode_tokens_per_s" in s and "plain_tokens_per_s" in s:
        with_draft, plain = s["decode_tokens_per_s"], s["plain_tokens_per_s"]
        ratio = f" ({with_draft / plain:.2f}x)" if plain else ""
        rows.append(("decoding, with the draft", f"{with_draft:,.1f} tokens/s{ratio}"))
        rows.append(("decoding, target alone", f"{plain:,.1f} tokens/s"))
    rows.append(("training speed", f"{s['tokens_per_s']:,.0f} tokens/s"))
    rows += [("computed in", s["dtype"])] if "dtype" in s else []
    rows += [("cut by the clock", "; ".join(s["cut"]))] if s.get("cut") else []
    rows.append(("time in all", f"{timedelta(seconds=round(s['seconds_total']))} ({s['seconds_total']:.0f} s)"))
    rows.append(("checkpoint", str(s["export_dir"])))
    if "report" in s:
        rows.append(("report", str(s["report"])))
    return rows


def _check(summary: dict[str, Any]) -> None:
    missing = [key for key in REQUIRED if key not in summary]
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}; it has {', '.join(sorted(summary)) or 'nothing'}")


def _number(value: float | None) -> str:
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _shares(values: list[float | None]) -> str:
    return "  ".join("-" if v is None else f"{v:.3f}" for v in values)


def _jsonable(value: Any) -> Any:
    """NaN and infinity as null, paths as text."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# --- pictures ----------------------------------------------------------------------------------------------------


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one name; null (it was NaN) is a gap."""
    points = [(r["step"], math.nan if r[name] is None else r[name]) for r in records if name in r]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the curve; a gap leaves it where it was."""
    keep, mean, out = 1 - 1 / max(1.0, len(values) / 20), math.nan, []
    for value in values:
        if not math.isnan(value):
            mean = value if math.isnan(mean) else keep * mean + (1 - keep) * value
        out.append(mean)
    return out


def _draw(axes: Any, records: list[dict[str, Any]], name: str, color: Any, label: str) -> None:
    """A name's training curve (thin as measured, thick smoothed) and its held-out points."""
    steps, values = _series(records, name)
    axes.plot(steps, values, color=color, alpha=0.25, lw=0.8)
    axes.plot(steps, _smooth(values), color=color, label=label if steps else None)
    held_steps, held = _series(records, f"eval/{name}")
    axes.plot(held_steps, held, "o", color=color, ms=4.5, label=f"{label}, held-out" if held_steps else None)


def _draw_loss(axes: Any, records: list[dict[str, Any]]) -> None:
    _draw(axes, records, "loss", "C0", "loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _draw_acceptance(axes: Any, records: list[dict[str, Any]]) -> None:
    names = {key.removeprefix("eval/") for record in records for key in record}
    depth = sum(1 for name in names if name[:1] == "a" and name[1:].isdigit())
    for i in range(depth):
        _draw(axes, records, f"a{i}", matplotlib.colormaps["viridis"](0.85 * i / max(1, depth - 1)), f"step {i}")
    axes.set(xlabel="optimizer step", ylabel="acceptance (share)", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _kept(values: list[float | None]) -> list[float]:
    """Running product of acceptance: the share of rounds that gets past each depth. Ends where a step has no value."""
    known = values[: values.index(None)] if None in values else values
    return [math.prod(known[: i + 1]) for i in range(len(known))]


def _draw_depths(axes: Any, s: dict[str, Any]) -> None:
    bars = {"simulated, sampling (product of acceptance)": _kept(s["step_acceptance"])}
    if "step_top1" in s:
        bars["simulated, greedy (product of top-1 agreement)"] = _kept(s["step_top1"])
    if "decode_step_acceptance" in s:
        bars["measured in decoding"] = list(s["decode_step_acceptance"])
    width = 0.8 / len(bars)
    for j, (name, values) in enumerate(bars.items()):
        places = [i + 1 + (j - (len(bars) - 1) / 2) * width for i in range(len(values))]
        axes.bar_label(axes.bar(places, values, width * 0.94, label=name), fmt="%.2f", padding=2, fontsize=7)
    axes.set(xlabel="draft depth (tokens)", ylabel="share of rounds that keep it", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _sample(pieces: list[tuple[str, int | None]]) -> Text:
    """Decoded text for a terminal: neighbouring target forwards' tokens differ in colour, the prompt is dim."""
    forwards = list(dict.fromkeys(number for _, number in pieces if number is not None))
    tokens = sum(number is not None for _, number in pieces)
    text = Text(f"Decoded text: {tokens} tokens in {len(forwards)} target forwards\n", style="bold", end="\n")
    for piece, number in pieces:
        text.append(piece, "dim" if number is None else FORWARD_COLORS[forwards.index(number) % 2])
    return text
