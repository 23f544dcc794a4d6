"""What a finished run has to show: summary.json, a closing table, report.html with its pictures; and data.html of its data.

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
    by_position                `asdict(TauReport)["by_position"]`
    decode_sample              [[text, round], ...]: decoded pieces in order and the target forward each came from;
                               round null for the prompt
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from fastdraft.data.statistics import Statistics
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
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2f6fde", "#e8833a", "#2a9d72"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}
# background of a decoded token by how many tokens its target forward gave: 1, 2, 3, 4, 5 and more
SAMPLE_COLORS = ("#eef1f4", "#d3e5fb", "#a5cdf7", "#73b0ef", "#3f8fe0")


def write_summary(run_dir: Path | str, summary: dict[str, Any]) -> Path:
    """Writes run_dir/summary.json, whole or not at all. Raises ValueError naming the keys that are missing."""
    _check(summary)
    path = Path(run_dir) / "summary.json"
    write_file(path, (json.dumps(_jsonable(summary), indent=2, allow_nan=False) + "\n").encode())
    return path


def write_report(run_dir: Path | str, summary: dict[str, Any]) -> Path:
    """Writes run_dir/report.html (self-contained) and its pictures run_dir/report/*.png from metrics.jsonl and the summary.

    A picture without data is left out. Raises ValueError when metrics.jsonl or a needed key of the summary is missing.
    """
    _check(summary)
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    with matplotlib.rc_context(STYLE):
        figures = {
            "loss": _loss_figure(records),
            "acceptance": _acceptance_figure(records),
            "tau_sim": _tau_figure(records),
            "accepted_length": _accepted_length_figure(summary),
            "steps": _steps_figure(summary),
            "position": _position_figure(summary),
        }
        pictures = {name: png(figure) for name, figure in figures.items() if figure is not None}
    for name in figures:
        path = run_dir / "report" / f"{name}.png"
        if name in pictures:
            write_file(path, pictures[name])
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    cards = [
        (_number(summary["accepted_length"]), "tokens per target forward, trained"),
        (_number(summary["accepted_length_untrained"]), "before training"),
        (_number(summary["tau_sim"]), "tau_sim, held-out"),
        (str(timedelta(seconds=round(summary["seconds_total"]))), "hours, in all"),
    ]
    sample = _sample(summary["decode_sample"]) if summary.get("decode_sample") else ""
    path = run_dir / "report.html"
    write_file(path, _page(f"fastdraft run {run_dir.resolve().name}", cards, pictures, sample, _facts(summary)).encode())
    return path


def write_data_report(folder: Path | str, numbers: Statistics, lines: list[str], draft_vocab_size: int) -> Path:
    """Writes folder/data.html (self-contained) and its pictures folder/*.png; `lines` are what is said about the data."""
    with matplotlib.rc_context(STYLE):
        pictures = {
            "lengths": png(_lengths_figure(numbers)),
            "trained_share": png(_trained_figure(numbers)),
            "coverage": png(_coverage_figure(numbers, draft_vocab_size)),
        }
    for name, picture in pictures.items():
        write_file(Path(folder) / f"{name}.png", picture)
    covered = numbers.coverage(draft_vocab_size)[draft_vocab_size]
    cards = [
        (f"{len(numbers.lengths):,}", "train samples"),
        (f"{numbers.lengths.sum():,}", "tokens"),
        (f"{numbers.trained.sum() / numbers.lengths.sum():.0%}", "of them trained"),
        (f"{covered:.2%}", f"of those among the {draft_vocab_size:,} commonest"),
        (f"{numbers.fill.mean() / numbers.pack_tokens:.1%}", "of the packs is filled"),
    ]
    path = Path(folder) / "data.html"
    write_file(path, _page("fastdraft data", cards, pictures, "", [("", line) for line in lines]).encode())
    return path


def render_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the closing table of a run. Raises ValueError naming the keys that are missing."""
    _check(summary)
    table = Table(title="fastdraft: what this run reached", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _facts(summary):
        table.add_row(name, value)
    console.print(table, markup=False)


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


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


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


def _step_colors(count: int) -> list[Any]:
    return [matplotlib.colormaps["viridis"](0.05 + 0.85 * i / max(1, count - 1)) for i in range(count)]


def _curves(axes: Any, records: list[dict[str, Any]], name: str) -> bool:
    """Training curve (thin as measured, thick smoothed) and held-out points of one name; whether there was any."""
    steps, values = _series(records, name)
    held_steps, held = _series(records, f"eval/{name}")
    if steps:
        smooth = len(steps) > 40
        axes.plot(steps, values, color=BLUE, alpha=0.3 if smooth else 1, lw=0.8 if smooth else 1.8, label="training")
        if smooth:
            axes.plot(steps, _smooth(values), color=BLUE, label="training, smoothed")
    if held_steps:
        axes.plot(held_steps, held, "o-", color=ORANGE, ms=4.5, label="held-out")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps or held_steps:
        axes.legend()
    return bool(steps or held_steps)


def _loss_figure(records: list[dict[str, Any]]) -> Figure | None:
    figure, axes = _figure("Loss", "optimizer step", "loss (nats per token)")
    return figure if _curves(axes, records, "loss") else None


def _tau_figure(records: list[dict[str, Any]]) -> Figure | None:
    figure, axes = _figure("Simulated accepted length", "optimizer step", "tau_sim (tokens per target forward)")
    return figure if _curves(axes, records, "tau_sim") else None


def _acceptance_figure(records: list[dict[str, Any]]) -> Figure | None:
    names = {key.removeprefix("eval/") for r in records for key in r}
    depth = sum(1 for name in names if name[:1] == "a" and name[1:].isdigit())
    if not depth:
        return None
    figure, axes = _figure("Acceptance of each TTT step", "optimizer step", "acceptance (share, 0 to 1)")
    for i, color in enumerate(_step_colors(depth)):
        steps, values = _series(records, f"a{i}")
        axes.plot(steps, _smooth(values) if len(steps) > 40 else values, color=color, label=f"step {i}")
        held_steps, held = _series(records, f"eval/a{i}")
        axes.plot(held_steps, held, "o", color=color, ms=4.5, clip_on=False, label=None if steps else f"step {i}")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    line, dots = (any(f"{head}a0" in r for r in records) for head in ("", "eval/"))
    how = "\n".join(name for name, there in (("line: training", line), ("dots: held-out", dots)) if there)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=how, title_fontsize=8.5)
    return figure


def _accepted_length_figure(s: dict[str, Any]) -> Figure | None:
    bars = [
        ("untrained draft,\ndecoding", s["accepted_length_untrained"], MUTED),
        ("trained draft,\ndecoding", s["accepted_length"], BLUE),
        (f"trained draft, tau_sim\n({len(s['step_acceptance'])} simulated steps)", s["tau_sim"], "#a9c5f5"),
    ]
    bars = [bar for bar in bars if bar[1] is not None and math.isfinite(bar[1])]
    if not bars:
        return None
    figure, axes = _figure("Accepted length before and after training", "", "tokens per target forward")
    names, heights, colors = zip(*bars, strict=True)
    drawn = axes.bar(names, heights, color=colors, width=0.55)
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontweight="bold")
    axes.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        "no draft: 1", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right"
    )
    axes.set_ylim(0, 1.15 * max(*heights, 1.0))
    axes.set_xlim(-0.6, len(bars) - 0.1)
    axes.grid(axis="x", visible=False)
    return figure


def _kept(values: list[float | None]) -> list[float]:
    """Running product of acceptance: the share of rounds that gets past each depth. Ends where a step has no value."""
    known = values[: values.index(None)] if None in values else values
    return [math.prod(known[: i + 1]) for i in range(len(known))]


def _short(value: float) -> str:  # 0.52 -> .52: room for two bars' labels side by side
    return f"{value:.2f}".removeprefix("0")


def _steps_figure(s: dict[str, Any]) -> Figure | None:
    bars = [("simulated, sampling (product of acceptance)", _kept(s["step_acceptance"]), "#a9c5f5")]
    if "step_top1" in s:
        bars.append(("simulated, greedy (product of top-1 agreement)", _kept(s["step_top1"]), GREEN))
    if "decode_step_acceptance" in s:
        bars.append(("measured in decoding", list(s["decode_step_acceptance"]), BLUE))
    depth = max(len(values) for _, values, _ in bars)
    if not depth:
        return None
    figure, axes = _figure("The final draft, depth by depth", "draft depth (tokens)", "share of rounds that keep it")
    width = 0.8 / len(bars)
    for j, (name, values, color) in enumerate(bars):
        places = [i + 1 + (j - (len(bars) - 1) / 2) * width for i in range(len(values))]
        drawn = axes.bar(places, values, width * 0.94, color=color, label=name)
        axes.bar_label(drawn, fmt=_short, padding=2, fontsize=6.5 if len(bars) * depth > 12 else 8)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, depth + 1))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")
    return figure


def _position_figure(s: dict[str, Any]) -> Figure | None:
    buckets = s.get("by_position")
    if not buckets:
        return None
    figure, axes = _figure("Acceptance by place in the document", "position (tokens)", "acceptance (share, 0 to 1)")
    depth = max(len(b["means"]["acceptance"]) for b in buckets)
    width = 0.84 / depth
    for i, color in enumerate(_step_colors(depth)):
        values = [b["means"]["acceptance"][i] for b in buckets]
        places = [x + (i - (depth - 1) / 2) * width for x in range(len(buckets))]
        axes.bar(places, [math.nan if v is None else v for v in values], width * 0.92, color=color, label=f"step {i}")
    names = [f"{b['start']:,} to {b['end'] - 1:,}" if b["end"] else f"from {b['start']:,}" for b in buckets]
    rows = [b["means"]["num_live"][0] for b in buckets]
    axes.set_xticks(range(len(buckets)), [f"{name}\n{n:,} rows" for name, n in zip(names, rows, strict=True)], fontsize=8)
    axes.set_ylim(0, 1)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _lengths_figure(numbers: Statistics) -> Figure:
    figure, axes = _figure("Length of the samples", "tokens", "samples")
    edges = np.geomspace(numbers.lengths.min(), numbers.lengths.max() + 1, 41)
    axes.hist(numbers.lengths, bins=edges, color=BLUE)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if edges[-1] < 10 * edges[0]:  # too little for a label at every power of ten; matplotlib's own are 5 x 10^1
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    return figure


def _trained_figure(numbers: Statistics) -> Figure:
    figure, axes = _figure("Trained share of the samples", "trained tokens (share, 0 to 1)", "samples")
    axes.hist(numbers.trained / numbers.lengths, bins=np.linspace(0, 1, 41), color=GREEN)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    return figure


def _coverage_figure(numbers: Statistics, draft_vocab_size: int) -> Figure:
    figure, axes = _figure("Trained tokens in the vocabulary map", "draft vocabulary (tokens)", "coverage (share, 0 to 1)")
    share = np.cumsum(np.sort(numbers.counts)[::-1]) / numbers.counts.sum()
    axes.plot(np.arange(1, len(share) + 1), share, color=BLUE)
    for size, covered in numbers.coverage(draft_vocab_size).items():
        color = ORANGE if size == draft_vocab_size else MUTED
        axes.plot([size], [covered], "o", color=color, ms=5, label=f"{size:,}: {covered:.2%}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_ylim(0, 1.03)
    axes.legend(loc="lower right")
    return figure


# --- the page ----------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }}
h1 {{ font-size: 26px; margin: 0 0 20px; }} h2 {{ font-size: 18px; margin: 36px 0 12px; }}
.big {{ display: flex; flex-wrap: wrap; gap: 14px; }}
.big div, section, .pictures figure {{ background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; }}
.big div {{ padding: 14px 20px; flex: 1 1 150px; }}
.big b {{ display: block; font-size: 28px; line-height: 1.2; }} .big span {{ color: #52606d; font-size: 13px; }}
.pictures {{ display: grid; gap: 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }}
figure {{ margin: 0; padding: 10px; }} img {{ width: 100%; height: auto; display: block; }}
section {{ padding: 14px 20px; overflow-x: auto; }}
table {{ border-collapse: collapse; }} td {{ padding: 4px 24px 4px 0; vertical-align: top; }}
td:first-child {{ color: #52606d; }}
.sample {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; }}
.sample span, .key span {{ border-radius: 4px; padding: 2px 0; }} .key span {{ padding: 2px 9px; margin-right: 6px; }}
.sample span.first {{ border-left: 2px solid #1f2933; border-radius: 0 4px 4px 0; }}
.key {{ color: #52606d; font-size: 13px; margin: 0 0 12px; }} .prompt {{ color: #7b8794; }}
</style></head><body><main>
<h1>{title}</h1>
<div class="big">{cards}</div>
<div class="pictures">{pictures}</div>
{sample}
<h2>Numbers</h2><section><table>{facts}</table></section>
</main></body></html>
"""

ALT = {
    "loss": "training and held-out loss against optimizer steps",
    "acceptance": "acceptance of each TTT step against optimizer steps",
    "tau_sim": "simulated accepted length against optimizer steps",
    "accepted_length": "accepted length of the untrained and the trained draft",
    "steps": "share of rounds that keep each draft depth, simulated and measured",
    "position": "acceptance by position in the document",
    "lengths": "histogram of sample lengths",
    "trained_share": "histogram of the trained share of samples",
    "coverage": "share of trained tokens that a vocabulary map holds, by its size",
}


def _page(
    title: str, cards: list[tuple[str, str]], pictures: dict[str, bytes], sample: str, facts: list[tuple[str, str]]
) -> str:
    return PAGE.format(
        title=html.escape(title),
        cards="".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in cards),
        pictures="".join(
            f'<figure><img alt="{ALT[key]}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></figure>'
            for key, picture in pictures.items()
        ),
        sample=sample,
        facts="".join(f"<tr><td>{k}</td><td>{html.escape(v)}</td></tr>" for k, v in facts),
    )


def _sample(pieces: list[tuple[str, int | None]]) -> str:
    """Decoded text; a token's background says how many tokens its target forward gave, a bar where a forward begins."""
    sizes = Counter(number for _, number in pieces if number is not None)
    most = len(SAMPLE_COLORS)
    spans, before = [], None
    for text, number in pieces:
        if number is None:
            spans.append(f'<span class="prompt">{html.escape(text)}</span>')
        else:
            first = ' class="first"' if number != before else ""
            color = SAMPLE_COLORS[min(sizes[number], most) - 1]
            spans.append(f'<span{first} style="background:{color}">{html.escape(text)}</span>')
        before = number
    key = "".join(
        f'<span style="background:{color}">{i + 1}{" or more" if i + 1 == most else ""}</span>'
        for i, color in enumerate(SAMPLE_COLORS)
    )
    tokens = sum(sizes.values())
    return (
        f"<h2>Decoded text: {tokens} tokens in {len(sizes)} target forwards</h2><section>"
        f'<p class="key">tokens given by one target forward: {key}</p><div class="sample">{"".join(spans)}</div></section>'
    )
