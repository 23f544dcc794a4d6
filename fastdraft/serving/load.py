"""`fastdraft bench serve`: what a draft is worth in a running SGLang or vLLM server.

A cell is one prompt set at one number of requests in flight, streamed through /v1/chat/completions. Every cell has a cache
salt of its own, so that no cell's prefill reads another's prefix cache. Its numbers:

    accepted length    (output tokens - requests) / verifying target forwards, as DecodeReport.accepted_length: a forward's
                       own (bonus) token counts, the prefill's, one a request, does not
    step_acceptance    share of verifying forwards that kept a drafted token at depth 1, 2, ...
    time per token     the time between an answer's first and last text, shared by its tokens after the first

Where the forwards are counted:
    SGLang  each request's spec_tokens_details (spec_verify_ct, spec_correct_drafts_histogram); versions that do not stream
            them (0.5.17) give them as meta_info in a second pass over the cell, not streamed and not timed
    vLLM    the counters vllm:spec_decode_num_{drafts,accepted_tokens,accepted_tokens_per_pos}_total
Counters are read before and after a cell and count by their difference. vLLM does not count a forward that had nothing
drafted to verify; as one gives at most its accepted tokens and one more, there were at least (output tokens - requests -
accepted tokens) forwards in all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from fastdraft.answers.dialogue import for_request
from fastdraft.answers.servers import parse_fields
from fastdraft.data.prompts import Prompt
from fastdraft.serving.client import (
    GENERATED,
    VLLM_ACCEPTED,
    VLLM_BY_POSITION,
    VLLM_DRAFTS,
    Answer,
    Counters,
    Server,
    SpecDetails,
    ask_all,
    by_position,
    connect,
    counted_since,
    probe,
    read_counters,
)

ACCEPTED_LENGTH = (
    "tokens per verifying forward of the target, its own (bonus) token included and the prefill's left out, "
    "as fastdraft evaluate counts"
)

# The fields of a request that the command sets: another value would make the report untrue.
OWN_FIELDS = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "n", "stream", "stream_options"}


@dataclass(frozen=True)
class Load:
    """What is sent. `body` holds further fields of every request, such as chat_template_kwargs."""

    concurrency: tuple[int, ...] = (1,)  # requests in flight, a cell each
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    body: dict[str, Any] = field(default_factory=dict)
    num_warmup: int = 2  # requests to each server before the first cell, not measured
    timeout_s: float = 300.0  # for one whole answer
    retries: int = 2

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1 or len(set(self.concurrency)) < len(self.concurrency):
            raise ValueError(f"concurrency {self.concurrency} must be numbers of at least 1, each once")
        for name, least in {"max_new_tokens": 2, "temperature": 0, "num_warmup": 0, "retries": 0, "timeout_s": 0.1}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


def parse_load(concurrency: str, body: str, **rest: Any) -> Load:
    """A Load from what a command line holds: "1,4,16", and a JSON object as text. Raises ValueError."""
    try:
        numbers = tuple(int(number) for number in concurrency.split(","))
    except ValueError as error:
        raise ValueError(f"concurrency {concurrency!r} must be whole numbers with commas, like 1,4,16") from error
    return Load(numbers, body=parse_fields(body, "--body", OWN_FIELDS), **rest)


@dataclass(frozen=True)
class Acceptance:
    accepted_length: float  # ACCEPTED_LENGTH
    engine_accept_length: float  # vLLM's own: 1 + accepted / drafts; SGLang's: output tokens / verifying forwards
    num_forwards: int  # verifying ones
    step_acceptance: list[float] | None


@dataclass(frozen=True)
class Percentiles:
    """Over requests."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Measured:
    """One cell on one server."""

    num_requests: int
    num_retries: int
    num_output_tokens: int
    seconds: float  # from the first request sent to the last answer's end
    output_tokens_per_s: float
    first_token_ms: Percentiles | None  # None without any text
    per_token_ms: Percentiles | None  # None when every answer came in one piece
    end_to_end_ms: Percentiles
    acceptance: Acceptance | None  # None: no speculation, or not reported


@dataclass(frozen=True)
class Cell:
    prompts: str  # name of the set
    prompts_sha256: str  # of what was asked
    concurrency: int
    measured: Measured
    baseline: Measured | None
    speedup: float | None  # output tokens/s over the baseline's


@dataclass(frozen=True)
class ServeReport:
    """`asdict` gives what JSON can hold."""

    accepted_length_means: str
    server: Server
    baseline_server: Server | None
    load: Load
    cells: list[Cell]
    notes: list[str]  # what the servers did not report, and what else a reader must know


def read_report(path: Path) -> ServeReport:
    """A serve.json, to compare with. Raises ValueError when it is none."""
    try:
        return TypeAdapter(ServeReport).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no serve.json of fastdraft bench serve: {where}: {first['msg']}") from error


def bench_serve(
    url: str,
    prompts: Mapping[str, Sequence[Prompt]],  # by the set's name
    load: Load,
    baseline_url: str | None = None,
    baseline: ServeReport | None = None,  # of an earlier run with the same prompts and load
    api_key: str | None = None,
    on_cell: Callable[[ServeReport], None] = lambda report: None,  # gets the report so far after each cell
) -> ServeReport:
    """Measures every prompt set at every concurrency; with `baseline_url`, each cell there too, right after.

    Raises ValueError, in one sentence, when a server cannot be reached, is of neither engine, refuses a request, is too
    slow or dies, and when `baseline` lacks a cell or was measured otherwise.
    """
    if baseline is not None and baseline_url is not None:
        raise ValueError("give a baseline's URL or an earlier baseline's file, not both")
    if not prompts or not all(prompts.values()):
        raise ValueError("no prompts; give at least one set, each with at least one prompt")
    earlier = _earlier_cells(baseline, prompts, load) if baseline is not None else {}
    urls = [url] if baseline_url is None else [url, baseline_url]
    return asyncio.run(_bench(urls, prompts, load, baseline, earlier, api_key, on_cell))


def _sha256(prompts: Sequence[Prompt]) -> str:
    asked = [p._asdict() if p.tools else p.messages for p in prompts]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _earlier_cells(
    baseline: ServeReport, prompts: Mapping[str, Sequence[Prompt]], load: Load
) -> dict[tuple[str, int], Measured]:
    """The baseline's cells by prompts and concurrency. ValueError: it lacks one, or was measured otherwise."""
    for name in ("max_new_tokens", "temperature", "body"):
        now, then = getattr(load, name), getattr(baseline.load, name)
        if now != then:
            raise ValueError(f"the baseline was measured with {name} {then}, this run has {now}: they do not compare")
    cells = {(cell.prompts_sha256, cell.concurrency): cell.measured for cell in baseline.cells}
    for name, asked in prompts.items():
        for concurrency in load.concurrency:
            if (_sha256(asked), concurrency) not in cells:
                raise ValueError(f"the baseline has no cell with the prompts of {name} at concurrency {concurrency}")
    return cells


async def _bench(
    urls: list[str],  # the server's, and a baseline's
    prompts: Mapping[str, Sequence[Prompt]],
    load: Load,
    baseline: ServeReport | None,
    earlier: dict[tuple[str, int], Measured],
    api_key: str | None,
    on_cell: Callable[[ServeReport], None],
) -> ServeReport:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(url, api_key)) for url in urls]
        servers = [await probe(client) for client in clients]
        other = servers[1] if servers[1:] else baseline and baseline.server
        notes = _first_notes(servers[0], other, prompts, load)
        if warm := list(islice(chain.from_iterable(prompts.values()), load.num_warmup)):
            for client, server in zip(clients, servers, strict=True):
                await _measure(client, server, warm, 1, load, [])
        report = ServeReport(ACCEPTED_LENGTH, servers[0], other, load, [], notes)
        for name, asked in prompts.items():
            for concurrency in load.concurrency:
                both = [
                    await _measure(client, server, asked, concurrency, load, notes)
                    for client, server in zip(clients, servers, strict=True)
                ]
                measured, plain = both if both[1:] else (both[0], earlier.get((_sha256(asked), concurrency)))
                speedup = measured.output_tokens_per_s / plain.output_tokens_per_s if plain else None
                cell = Cell(name, _sha256(asked), concurrency, measured, plain, speedup)
                report = replace(report, cells=[*report.cells, cell], notes=list(dict.fromkeys(notes)))
                on_cell(report)
    return report


def _first_notes(server: Server, baseline: Server | None, prompts: Mapping[str, Sequence[Prompt]], load: Load) -> list[str]:
    notes = []
    if server.speculates is False:
        notes.append(f"{server.url} runs without speculation: there is no accepted length to measure")
    if baseline is not None and baseline.speculates is not False:
        said = "speculates" if baseline.speculates else "may speculate, it does not say"
        notes.append(f"the baseline {baseline.url} {said}: then the speed-up is not over the target alone")
    if baseline is not None and baseline.model != server.model:
        notes.append(f"{server.url} serves {server.model}, the baseline {baseline.model}")
    for name, asked in prompts.items():
        if len(asked) < max(load.concurrency):
            notes.append(f"prompts in {name}: {len(asked)}, so never more than that many in flight")
    return notes


# --- one cell ------------------------------------------------------------------------------------------------------------


async def _measure(
    client: httpx.AsyncClient,
    server: Server,
    prompts: Sequence[Prompt],
    concurrency: int,
    load: Load,
    notes: list[str],  # gets what the server did not report
) -> Measured:
    body = {
        "model": server.model,
        "max_tokens": load.max_new_tokens,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": uuid.uuid4().hex,
        **({"return_spec_tokens_details": True} if server.engine == "SGLang" else {}),
        **load.body,
    }
    bodies = [body | for_request(*prompt) for prompt in prompts]
    before = await read_counters(client)
    start = time.perf_counter()
    answers = await ask_all(client, bodies, concurrency, load.timeout_s, load.retries)
    seconds = time.perf_counter() - start
    num_tokens, num_retries = sum(a.num_tokens for a in answers), sum(a.num_retries for a in answers)
    if num_retries:
        notes.append(f"{server.url}: {num_retries} times a request was sent again; tokens/s holds the time that was lost")
    if mute := sum(a.first_s is None for a in answers):
        notes.append(f"{server.url} streamed no text for {mute} of {len(answers)} requests: first tokens are of the others")
    if not num_tokens:
        raise ValueError(f"{server.url} answered {len(answers)} requests without a single token")
    generated = GENERATED[server.engine]
    counted = await counted_since(client, before, generated, num_tokens)
    others = round(counted.get((generated, ""), num_tokens) - num_tokens)
    if others:
        why = "other requests, answers cut off, or counters that are late"
        notes.append(f"{server.url} counted {others:+d} tokens besides those answered here: {why}")
    if server.speculates is False:
        acceptance = None
    elif server.engine == "vLLM":
        acceptance = _vllm_acceptance(server, answers, counted, others, notes)
    else:
        again = await _unstreamed(client, bodies, concurrency, load) if _details(answers) is None else None
        if again is not None:
            notes.append(f"{server.url} does not stream spec_tokens_details: counted in a second, unstreamed pass")
        acceptance = _sglang_acceptance(server, again or answers, notes)
    several = [a for a in answers if a.num_tokens > 1 and a.first_s is not None and a.last_s > a.first_s]
    return Measured(
        num_requests=len(answers),
        num_retries=num_retries,
        num_output_tokens=num_tokens,
        seconds=seconds,
        output_tokens_per_s=num_tokens / seconds,
        first_token_ms=_percentiles([a.first_s for a in answers if a.first_s is not None]),
        per_token_ms=_percentiles([(a.last_s - a.first_s) / (a.num_tokens - 1) for a in several]),
        end_to_end_ms=_percentiles([a.end_s for a in answers]),
        acceptance=acceptance,
    )


async def _unstreamed(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], concurrency: int, load: Load
) -> list[Answer] | None:
    """Answers of the same requests in one piece, where SGLang tells its verifying forwards. None: it does not."""
    changes = {"stream": False, "stream_options": None, "return_meta_info": True, "cache_salt": uuid.uuid4().hex}
    again = await ask_all(client, [b | changes for b in bodies], concurrency, load.timeout_s, load.retries)
    return None if _details(again) is None else again


def _percentiles(seconds: list[float]) -> Percentiles | None:
    return Percentiles(*(np.percentile(seconds, (50, 90, 99)) * 1e3).tolist()) if seconds else None


def _after_prefill(answers: list[Answer]) -> int:
    return sum(a.num_tokens - 1 for a in answers if a.num_tokens)


def _vllm_acceptance(
    server: Server, answers: list[Answer], counted: Counters, others: int, notes: list[str]
) -> Acceptance | None:
    drafts, accepted = (round(counted.get((name, ""), 0)) for name in (VLLM_DRAFTS, VLLM_ACCEPTED))
    if server.speculates is None:
        notes.append(f"{server.url} reports nothing of speculation: no vllm: counters in /metrics (--disable-log-stats?)")
    elif not drafts:
        notes.append(f"{server.url} can speculate but verified nothing drafted")
    if not drafts:
        return None
    own = 1 + accepted / drafts
    steps = [value / drafts for value in by_position(counted)]
    if not steps:
        notes.append(f"{server.url} does not report acceptance by depth ({VLLM_BY_POSITION})")
    if others:  # the counters' ratio holds whosesoever tokens they are
        notes.append(f"{server.url}: accepted length is therefore 1 + accepted / drafts of all it served meanwhile")
        return Acceptance(own, own, drafts, steps or None)
    produced = _after_prefill(answers)
    forwards = max(drafts, produced - accepted)
    if forwards > drafts:
        notes.append(f"{server.url}: some target forwards had nothing drafted to verify; the accepted length counts them")
    return Acceptance(produced / forwards, own, forwards, steps or None)


def _details(answers: list[Answer]) -> list[SpecDetails] | None:
    """Of each answer that was verified at all (one of a single token is the prefill's); None if one lacks them."""
    details = [a.spec for a in answers if a.num_tokens > 1]
    return details if all(d is not None and d.spec_verify_ct for d in details) else None


def _sglang_acceptance(server: Server, answers: list[Answer], notes: list[str]) -> Acceptance | None:
    details = _details(answers)
    if not details:
        missing = "it reports no verifying forwards by request (spec_tokens_details, or meta_info)"
        nothing = "it verified nothing, no answer was longer than the prefill's token"
        notes.append(f"{server.url} gives no accepted length: {missing if details is None else nothing}")
        return None
    forwards, tokens = sum(d.spec_verify_ct for d in details), sum(a.num_tokens for a in answers)
    kept = [d.spec_correct_drafts_histogram for d in details]
    num_steps = server.speculation.get("speculative_num_steps")  # beyond what any forward kept: shares of 0
    deepest = max(max(map(len, kept)) - 1, num_steps if isinstance(num_steps, int) and num_steps < 64 else 0)
    steps = [sum(sum(histogram[depth:]) for histogram in kept) / forwards for depth in range(1, deepest + 1)]
    if not any(kept):
        notes.append(f"{server.url} does not report acceptance by depth (spec_correct_drafts_histogram)")
    return Acceptance(_after_prefill(answers) / forwards, tokens / forwards, forwards, steps if any(kept) else None)


# --- the report ----------------------------------------------------------------------------------------------------------

LATENCIES = {"first token": "first_token_ms", "per token": "per_token_ms", "end to end": "end_to_end_ms"}
TABLES = {
    "Acceptance and speed": ("accepted length", "kept by depth", "tokens/s", "speed-up"),
    "Latency in ms: p50 / p90 / p99": tuple(LATENCIES),
}


def render_serve(report: ServeReport, console: Console) -> None:
    """Prints what was measured, what accepted length means, and the notes."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(_of_server(report.server))
    if report.baseline_server is not None:
        say(f"baseline {_of_server(report.baseline_server)}")
    for title, columns in TABLES.items():
        table = Table(title=title, title_justify="left")
        for name in ("prompts", "in flight", "server", *columns):
            table.add_column(name, justify="left" if name in ("prompts", "server", "kept by depth") else "right")
        for cell in report.cells:
            speedup = f"{cell.speedup:.2f}x" if cell.speedup else "-"
            rows = {"measured": _of_cell(cell.measured, report.server, speedup)}
            if cell.baseline is not None and report.baseline_server is not None:
                rows["baseline"] = _of_cell(cell.baseline, report.baseline_server, "1.00x")
            for where, values in rows.items():
                table.add_row(cell.prompts, str(cell.concurrency), where, *(values[name] for name in columns))
        console.print(table, markup=False)
    say(f"accepted length: {report.accepted_length_means}")
    for note in report.notes:
        say(f"note: {note}")


def _of_server(server: Server) -> str:
    said = ", ".join(f"{key} {value}" for key, value in server.speculation.items())
    none = "no speculation" if server.speculates is False else "speculation not reported"
    return f"{server.url}: {server.engine} {server.version or 'of unknown version'}, {server.model}, {said or none}"


def _of_cell(m: Measured, server: Server, speedup: str) -> dict[str, str]:
    """What the columns show of one cell on one server."""
    length, steps = "no draft" if server.speculates is False else "not reported", None
    if m.acceptance is not None:
        length, steps = f"{m.acceptance.accepted_length:.3f}", m.acceptance.step_acceptance
    return {
        "accepted length": length,
        "kept by depth": " ".join(f"{share:.2f}" for share in steps or []) or "-",
        "tokens/s": f"{m.output_tokens_per_s:,.1f}",
        "speed-up": speedup,
    } | {column: _of_three(getattr(m, name)) for column, name in LATENCIES.items()}


def _of_three(p: Percentiles | None) -> str:
    return "-" if p is None else " / ".join(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in (p.p50, p.p90, p.p99))
