"""Requests to OpenAI-compatible servers, for `data regenerate` and `bench serve`: what is asked again, and after how long.

httpx rather than the openai client: it is here already (huggingface_hub brings it), and what the openai client would add,
retries, knows one server and two attempts.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

CONNECT_S = 10.0
LONGEST_WAIT_S = 60.0  # between attempts, unless a server asks for more
LONGEST_RETRY_AFTER_S = 600.0
BUSY = (429, 502, 503, 504)  # the server's state, not the request's fault
PASSING = (408, 409, 425, *BUSY)  # and all from 500 on


class Again(Exception):
    """No answer this time: the reason, and whether it is the server that must rest, how long at least."""

    def __init__(self, reason: str, server_rests: bool = False, rest_s: float = 0.0) -> None:
        super().__init__(reason)
        self.server_rests, self.rest_s = server_rests, rest_s


class RefusedRequest(ValueError):
    """No answer, and no use in asking again."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def parse_fields(text: str, option: str, own: Collection[str]) -> dict[str, Any]:
    """Further fields of a request from a command's option. ValueError: it is no JSON object, or holds one of `own`."""
    try:
        fields = json.loads(text)
        json.dumps(fields, allow_nan=False)  # NaN and Infinity are none, though json reads them
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{option} must be a JSON object, not {text}")
    if held := sorted(fields.keys() & own):
        raise ValueError(f"{option} must not hold {', '.join(held)}: the command sets it, or has an option for it")
    return fields


def connect(api_key: str | None, base_url: str | httpx.URL = "", connect_s: float = CONNECT_S) -> httpx.AsyncClient:
    """A client that bounds connecting alone: whoever waits for an answer bounds that. ValueError: no key for a header."""
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError(
            "the API key holds what no header may, such as the end of a line; set --api-key-env's variable again"
        )
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        timeout=httpx.Timeout(None, connect=connect_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def retried(ask: Callable[[int], Awaitable[T]], retries: int, backoff_s: float) -> T:
    """What ask(attempt) gives. Where it raises Again it is asked again, `retries` times; then that Again is raised."""
    for attempt in range(retries):
        try:
            return await ask(attempt)
        except Again:
            await asyncio.sleep(backed_off(backoff_s, attempt))
    return await ask(retries)


def backed_off(backoff_s: float, times: int) -> float:
    """Seconds to wait after so many waits before; never all clients after the same time."""
    return min(backoff_s * 2**times, LONGEST_WAIT_S) * random.uniform(0.5, 1)


async def get(client: httpx.AsyncClient, url: str, timeout_s: float) -> httpx.Response:
    """What needs no generation. ValueError when nothing answers, or it wants a key."""
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.get(url)
    except TimeoutError as error:
        raise ValueError(f"{url} does not answer within {timeout_s:g} s; is the server still starting?") from error
    except httpx.RequestError as error:
        raise ValueError(
            f"{url} cannot be reached ({said(error)}); is the server running, is the address right?"
        ) from error
    if response.status_code in (401, 403):
        raise ValueError(
            f"{url} refuses the API key (HTTP {response.status_code}); set the variable that --api-key-env names to its key"
        )
    return response


def lost(error: httpx.RequestError) -> Again:
    """Of a request that got no response: a server that cannot be reached must rest."""
    return Again(f"{error.request.url}: {said(error)}", isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)))


def check_status(response: httpx.Response) -> None:
    """Raises Again or RefusedRequest unless the response, read to its end, is an answer."""
    status = response.status_code
    if status == 200:
        return
    reason = f"{response.url}: HTTP {status}: {error_text(response)}"
    if status in PASSING or status >= 500:
        raise Again(reason, status in BUSY, _retry_after_s(response))
    raise RefusedRequest(reason, status)


def error_text(response: httpx.Response) -> str:
    """What the server said is wrong, on one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        text = (error.get("message") or error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300] or response.reason_phrase


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that Retry-After asks for; a date, its other form, counts as none: the next rest is longer anyway."""
    try:
        return min(max(0.0, float(response.headers.get("Retry-After", 0))), LONGEST_RETRY_AFTER_S)
    except ValueError:
        return 0.0


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
