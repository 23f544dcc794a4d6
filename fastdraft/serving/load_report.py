"""The tables and the picture of `fastdraft bench serve`."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastdraft.report import INK, STYLE, png
from fastdraft.serving.client import Server
from fastdraft.serving.load import Cell, Percentiles, ServeReport

LATENCIES = ("first_token_ms", "inter_token_ms", "end_to_end_ms")


def render_serve(report: ServeReport, console: Console) -> None:
    """Prints what was measured, what accepted length means, and the notes."""
    _say(console, _server(report.server))
    if report.baseline_server is not None:
        _say(console, f"baseline {_server(report.baseline_server)}")
    table = Table(title="Acceptance and speed", title_justify="left")
    for name in ("prompts", "in flight", "accepted length", "kept by depth", "tokens/s", "baseline", "speed-up"):
        table.add_column(name, justify="left" if name in ("prompts", "kept by depth") else "right")
    for cell in report.cells:
        table.add_row(
            cell.prompts,
            str(cell.concurrency),
            _length(report, cell),
            " ".join(f"{share:.2f}" for share in _steps(cell)) or "-",
            f"{cell.measured.output_tokens_per_s:,.1f}",
            f"{cell.baseline.output_tokens_per_s:,.1f}" if cell.baseline else "-",
            f"{cell.speedup:.2f}x" if cell.speedup else "-",
        )
    console.print(table, markup=False)
    table = Table(title="Latency in ms: p50 / p90 / p99", title_justify="left")
    for name in ("prompts", "in flight", "server", "first token", "inter-token", "end to end"):
        table.add_column(name, justify="left" if name in ("prompts", "server") else "right")
    for cell in report.cells:
        for where, m in (("measured", cell.measured), ("baseline", cell.baseline)):
            if m is not None:
                latencies = (_percentiles(getattr(m, name)) for name in LATENCIES)
                table.add_row(cell.prompts, str(cell.concurrency), where, *latencies)
    console.print(table, markup=False)
    _say(console, f"accepted length: {report.accepted_length_means}")
    for note in report.notes:
        _say(console, f"note: {note}")


def _server(server: Server) -> str:
    said = ", ".join(f"{key} {value}" for key, value in server.speculation.items())
    none = "no speculation" if server.speculates is False else "speculation not reported"
    return f"{server.url}: {server.engine} {server.version or 'of unknown version'}, {server.model}, {said or none}"


def _length(report: ServeReport, cell: Cell) -> str:
    if cell.measured.acceptance is not None:
        return f"{cell.measured.acceptance.accepted_length:.3f}"
    return "no draft" if report.server.speculates is False else "not reported"


def _steps(cell: Cell) -> list[float]:
    return (cell.measured.acceptance and cell.measured.acceptance.step_acceptance) or []


def _percentiles(p: Percentiles | None) -> str:
    return "-" if p is None else " / ".join(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in (p.p50, p.p90, p.p99))


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def serve_picture(report: ServeReport) -> bytes:
    """PNG: speed, accepted length and inter-token latency against requests in flight, and acceptance by depth."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.8, 7.4), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        speed, length, latency, depth = figure.subplots(2, 2).flat
        sets = list(dict.fromkeys(cell.prompts for cell in report.cells))
        deepest = max(len(_steps(cell)) for cell in report.cells)
        for i, name in enumerate(sets):
            color = matplotlib.colormaps["viridis"](0.05 + 0.8 * i / max(1, len(sets) - 1))
            cells = [cell for cell in report.cells if cell.prompts == name]
            name = name.replace("$", r"\$")  # or matplotlib sets a formula
            name = "\u200b" + name if name.startswith("_") else name  # or it leaves the line out of the legend
            for label, style, measured in (
                (name, "o-", [(c.concurrency, c.measured) for c in cells]),
                (f"{name}, baseline", "o--", [(c.concurrency, c.baseline) for c in cells if c.baseline]),
            ):
                _line(speed, label, style, color, [(x, m.output_tokens_per_s) for x, m in measured])
                _line(latency, label, style, color, [(x, m.inter_token_ms.p50) for x, m in measured if m.inter_token_ms])
            known = [(c.concurrency, c.measured.acceptance) for c in cells if c.measured.acceptance]
            _line(length, name, "o-", color, [(x, a.accepted_length) for x, a in known])
            if steps := _steps(cells[0]):
                places = [d + 1 + (i - (len(sets) - 1) / 2) * 0.8 / len(sets) for d in range(len(steps))]
                label = f"{name}, {cells[0].concurrency} in flight"
                drawn = depth.bar(places, steps, 0.75 / len(sets), color=color, label=label)
                depth.bar_label(drawn, fmt="%.2f", padding=2, fontsize=6.5 if len(sets) * deepest > 12 else 8)
        ticks = sorted({cell.concurrency for cell in report.cells})
        for axes, title, y in (
            (speed, "Speed", "output tokens/s"),
            (length, "Accepted length", "tokens per verifying target forward"),
            (latency, "Inter-token latency, median", "ms"),
        ):
            axes.set(title=title, xlabel="requests in flight", ylabel=y)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
            if axes.lines:
                axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        length.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))  # no draft
        depth.set(title="Acceptance by depth", xlabel="draft depth (tokens)", ylabel="share of forwards that keep it")
        depth.set_ylim(0, 1)
        depth.set_xticks(range(1, deepest + 1))
        depth.grid(axis="x", visible=False)
        for axes in (speed, length, latency, depth):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
            else:
                axes.text(0.5, 0.5, "no draft, or not reported", transform=axes.transAxes, ha="center")
        return png(figure)


def _line(axes: Any, name: str, style: str, color: Any, points: list[tuple[int, float]]) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), style, ms=4.5, color=color, label=name)
