"""Requests to a running SGLang or vLLM server: which engine it is, its counters, and answers with their times.

Names as in SGLang 0.5.17 and 0.5.21 and vLLM 0.32.0. No request lacks a time-out, and no more are in flight than asked.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, NonNegativeInt, ValidationError

from fastdraft.answers import servers
from fastdraft.answers.servers import Again, check_status, lost, retried

PROBE_S = 10.0  # for an answer that needs no generation
BACKOFF_S = 1.0
PAST_LIMIT = 64  # tokens; a last verifying forward may count past max_tokens
SETTLE_S = 2.0  # counters may come this much later than the answers
SGLANG_SPECULATION = (
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
)
GENERATED = {"vLLM": "vllm:generation_tokens_total", "SGLang": "sglang:generation_tokens_total"}
VLLM_DRAFTS, VLLM_ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
VLLM_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
COUNTERS = {*GENERATED.values(), VLLM_DRAFTS, VLLM_ACCEPTED, VLLM_BY_POSITION}
# a delta's fields that hold generated text: the answer, either engine's name for thoughts, calls
TEXT = ("content", "reasoning_content", "reasoning", "tool_calls")

Counters = Mapping[tuple[str, str], float]  # COUNTERS by name and `position` (or ""), summed over engines and models


@dataclass(frozen=True)
class Server:
    url: str
    engine: str  # "SGLang" or "vLLM"
    version: str | None
    model: str
    speculates: bool | None  # None: it does not say
    speculation: dict[str, Any]  # what it says of it


class SpecDetails(BaseModel):
    """SGLang's of one request."""

    spec_verify_ct: NonNegativeInt = 0
    spec_correct_drafts_histogram: list[NonNegativeInt] = []  # [n] forwards that kept n drafted tokens


@dataclass(frozen=True)
class Answer:
    num_tokens: int
    first_s: float | None  # from sending to the first text; None without any
    last_s: float | None  # to the last text
    end_s: float
    spec: SpecDetails | None
    num_retries: int


# --- the server ----------------------------------------------------------------------------------------------------------


def connect(url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """A client for one server. Raises ValueError when `url` (with or without /v1) is not one."""
    try:
        parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or not 0 < (parsed.port or 1) < 1 << 16:
        raise ValueError(f"{url!r} is not a server's URL; give one like http://localhost:30000")
    return servers.connect(api_key, parsed)


def server_url(client: httpx.AsyncClient) -> str:
    return str(client.base_url).rstrip("/")


async def probe(client: httpx.AsyncClient) -> Server:
    """Which engine it is, and what it says of its speculation. Raises ValueError when it is neither or does not answer."""
    url = server_url(client)
    response = await servers.get(client, f"{url}/v1/models", PROBE_S)
    if response.status_code != 200:
        raise ValueError(
            f"{url}/v1/models: HTTP {response.status_code}: {servers.error_text(response)}; is the server ready?"
        )
    try:
        first = response.json()["data"][0]
        model, owner = first["id"], first.get("owned_by")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{url} is no OpenAI-compatible server: /v1/models lists no model") from error
    info = await _get_object(client, "/server_info") or await _get_object(client, "/get_server_info")
    if owner == "sglang" or "speculative_algorithm" in info:
        speculation = {key: info[key] for key in SGLANG_SPECULATION if info.get(key) is not None}
        speculates = bool(info["speculative_algorithm"]) if "speculative_algorithm" in info else None
        return Server(url, "SGLang", info.get("version"), model, speculates, speculation)
    counters = await read_counters(client)
    logs = (GENERATED["vLLM"], "") in counters
    if owner == "vllm" or logs:
        version = (await _get_object(client, "/version")).get("version")
        depth = len(by_position(counters))
        speculates = (VLLM_DRAFTS, "") in counters if logs else None
        return Server(url, "vLLM", version, model, speculates, {"num_speculative_tokens": depth} if depth else {})
    raise ValueError(
        f"{url} serves {model} but is neither SGLang (no /server_info) nor vLLM (no vllm: counters in /metrics)"
    )


async def _get_object(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """The JSON object at a path; empty if there is none."""
    response = await servers.get(client, f"{server_url(client)}{path}", PROBE_S)
    try:
        value = response.json() if response.status_code == 200 else {}
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


async def read_counters(client: httpx.AsyncClient) -> Counters:
    """What /metrics shows of COUNTERS; empty if it shows none."""
    response = await servers.get(client, f"{server_url(client)}/metrics", PROBE_S)
    sums: dict[tuple[str, str], float] = defaultdict(float)
    if response.status_code == 200:
        try:
            for family in text_string_to_metric_families(response.text):
                for sample in (s for s in family.samples if s.name in COUNTERS and math.isfinite(s.value)):
                    sums[sample.name, sample.labels.get("position", "")] += sample.value
        except ValueError:  # not Prometheus' format
            return {}
    return dict(sums)


async def counted_since(client: httpx.AsyncClient, before: Counters, generated: str, num_tokens: int) -> Counters:
    """What was added to the counters, read once `generated` holds `num_tokens` more, or after SETTLE_S.

    Raises ValueError when a counter went backwards.
    """
    give_up = time.perf_counter() + SETTLE_S
    while True:
        after = await read_counters(client)
        missing = before.get((generated, ""), 0) + num_tokens - after.get((generated, ""), 0)
        if missing <= 0 or (generated, "") not in after or time.perf_counter() > give_up:
            break
        await asyncio.sleep(0.05)
    counted = {key: value - before.get(key, 0) for key, value in after.items()}
    if any(value < 0 for value in counted.values()):
        raise ValueError(f"the counters of {server_url(client)} went backwards: it was started anew while it was measured")
    return counted


def by_position(counters: Counters) -> list[float]:
    """vLLM's accepted tokens at draft position 0, 1, ..."""
    pairs = ((position, value) for (name, position), value in counters.items() if name == VLLM_BY_POSITION)
    return [value for _, value in sorted((int(position), value) for position, value in pairs if position.isdecimal())]


# --- answers -------------------------------------------------------------------------------------------------------------


class _Usage(BaseModel):
    completion_tokens: NonNegativeInt | None = None


class _Choice(BaseModel):
    delta: dict[str, Any] = {}
    meta_info: SpecDetails | None = None


class _Extension(BaseModel):
    spec_tokens_details: SpecDetails | None = None


class _Reply(BaseModel):
    """One event of a stream, or the whole of an answer that does not stream."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    sglext: _Extension | None = None
    error: Any = None


async def ask_all(
    client: httpx.AsyncClient,
    bodies: list[dict[str, Any]],  # of /v1/chat/completions; streamed ones ask for usage
    concurrency: int,  # requests in flight at most
    timeout_s: float,  # for one whole answer
    retries: int,  # of a request that was cut off or met an overloaded server; one that timed out is not sent again
) -> list[Answer]:
    """Every body's answer, as they finish. The first that fails for good ends all; ValueError says why."""
    waiting, answers = iter(bodies), []

    async def work() -> None:
        for body in waiting:
            answers.append(await _ask(client, body, timeout_s, retries))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(bodies))):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return answers


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], timeout_s: float, retries: int) -> Answer:
    async def ask(num_retries: int) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                return await _answer(client, body, num_retries)
        except httpx.RequestError as error:
            raise lost(error) from error

    try:
        return await retried(ask, retries, BACKOFF_S)
    except TimeoutError as error:
        raise ValueError(
            f"{server_url(client)}: no whole answer to a request within {timeout_s:g} s; allow more time (--timeout), "
            "fewer tokens (--max-new-tokens) or fewer requests at once (--concurrency)"
        ) from error
    except Again as error:
        raise ValueError(f"a request failed {retries + 1} times, at last: {error}; see the server's log") from error


async def _answer(client: httpx.AsyncClient, body: dict[str, Any], num_retries: int) -> Answer:
    url = server_url(client)
    num_tokens, first_s, last_s, spec, done = None, None, None, None, not body["stream"]
    start = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            check_status(response)
        async for content in _events(response, body["stream"]):
            if content == b"[DONE]":
                done = True
                continue
            try:
                reply = _Reply.model_validate_json(content)
            except ValidationError as error:
                said = content[:200].decode(errors="replace")
                raise ValueError(f"{url} answers what is no chat completion: {said}") from error
            if reply.error is not None:
                raise Again(f"{url} reports {json.dumps(reply.error)[:300]}")
            if reply.usage is not None and reply.usage.completion_tokens is not None:
                num_tokens = reply.usage.completion_tokens
            if any(choice.delta.get(name) for choice in reply.choices for name in TEXT):
                last_s = time.perf_counter() - start
                first_s = first_s or last_s
            details = [reply.sglext and reply.sglext.spec_tokens_details, *(choice.meta_info for choice in reply.choices)]
            spec = next(filter(None, details), spec)
        end_s = time.perf_counter() - start
    if not done:
        kind = response.headers.get("Content-Type", "of no type")
        raise Again(f"{url}: the answer ({kind}) is no whole stream of events: it ended without [DONE]")
    if num_tokens is None:
        raise ValueError(f"{url} does not report how many tokens it generated (usage, asked for by stream_options)")
    if num_tokens > body["max_tokens"] + PAST_LIMIT:
        raise ValueError(f"{url} reports {num_tokens} tokens of an answer where {body['max_tokens']} were asked for")
    return Answer(num_tokens, first_s, last_s, end_s, spec, num_retries)


async def _events(response: httpx.Response, streamed: bool) -> AsyncIterator[bytes]:
    """What follows each `data:`. Not by httpx's lines: they also end at U+0085 or U+2028, which an answer may hold."""
    if not streamed:
        yield await response.aread()
        return
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
    if rest.strip() == b"data: [DONE]":  # some end the last line by ending
        yield b"[DONE]"
