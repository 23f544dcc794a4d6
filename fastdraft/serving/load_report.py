"""The tables of `fastdraft bench serve`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastdraft.serving.client import Server
from fastdraft.serving.load import Measured, Percentiles, ServeReport

LATENCIES = {"first token": "first_token_ms", "per token": "per_token_ms", "end to end": "end_to_end_ms"}
TABLES = {
    "Acceptance and speed": ("accepted length", "kept by depth", "tokens/s", "speed-up"),
    "Latency in ms: p50 / p90 / p99": tuple(LATENCIES),
}


def render_serve(report: ServeReport, console: Console) -> None:
    """Prints what was measured, what accepted length means, and the notes."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(_server(report.server))
    if report.baseline_server is not None:
        say(f"baseline {_server(report.baseline_server)}")
    for title, columns in TABLES.items():
        table = Table(title=title, title_justify="left")
        for name in ("prompts", "in flight", "server", *columns):
            table.add_column(name, justify="left" if name in ("prompts", "server", "kept by depth") else "right")
        for cell in report.cells:
            speedup = f"{cell.speedup:.2f}x" if cell.speedup else "-"
            rows = {"measured": _values(cell.measured, report.server, speedup)}
            if cell.baseline is not None and report.baseline_server is not None:
                rows["baseline"] = _values(cell.baseline, report.baseline_server, "1.00x")
            for where, values in rows.items():
                table.add_row(cell.prompts, str(cell.concurrency), where, *(values[name] for name in columns))
        console.print(table, markup=False)
    say(f"accepted length: {report.accepted_length_means}")
    for note in report.notes:
        say(f"note: {note}")


def _server(server: Server) -> str:
    said = ", ".join(f"{key} {value}" for key, value in server.speculation.items())
    none = "no speculation" if server.speculates is False else "speculation not reported"
    return f"{server.url}: {server.engine} {server.version or 'of unknown version'}, {server.model}, {said or none}"


def _values(m: Measured, server: Server, speedup: str) -> dict[str, str]:
    """What the columns show of one cell on one server."""
    length, steps = "no draft" if server.speculates is False else "not reported", None
    if m.acceptance is not None:
        length, steps = f"{m.acceptance.accepted_length:.3f}", m.acceptance.step_acceptance
    return {
        "accepted length": length,
        "kept by depth": " ".join(f"{share:.2f}" for share in steps or []) or "-",
        "tokens/s": f"{m.output_tokens_per_s:,.1f}",
        "speed-up": speedup,
    } | {column: _percentiles(getattr(m, name)) for column, name in LATENCIES.items()}


def _percentiles(p: Percentiles | None) -> str:
    return "-" if p is None else " / ".join(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in (p.p50, p.p90, p.p99))
