"""Answers from OpenAI-compatible servers (SGLang, vLLM, ...), many at once.

httpx rather than the openai client: it is here already (huggingface_hub brings it), and what the openai client would add,
retries, knows one server and two attempts. Here a server that refuses or is full rests for a time that doubles, or for
what its Retry-After says, and others take over; no server ever has more than `concurrency` requests at once.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from fastdraft.data.answer_job import Job, Sampling, Stopped
from fastdraft.data.dialogue import Dialogue, answer_message, for_request

LONGEST_REST_S = 60.0  # between attempts, unless a server asks for more
LONGEST_RETRY_AFTER_S = 600.0
FINISHED = ("stop", "length", "tool_calls")  # others (abort, error, content_filter) are no whole answer
BUSY = (429, 502, 503, 504)  # the server's state, not the request's fault
SPARE_FILES = 64  # besides one for each connection
AGAIN = (408, 409, 425, 500, *BUSY)
OWN_KEYS = ("model", "messages", "tools", "stream", "n", "temperature", "top_p", "top_k", "max_tokens", "seed")


class Unanswered(Exception):
    """No answer to a turn, and no use in asking again: the reason to list."""


class Again(Exception):
    """No answer this time: the reason, and whether it is the server that must rest, how long at least."""

    def __init__(self, reason: str, server_rests: bool = False, rest_s: float = 0.0) -> None:
        super().__init__(reason)
        self.server_rests, self.rest_s = server_rests, rest_s


@dataclass
class Server:
    url: str  # up to and with /v1
    slots: asyncio.Semaphore
    busy: int = 0  # requests under way or waiting for a slot
    rests: int = 0  # since the last answer
    resting_until: float = 0.0  # time.monotonic()
    answered_at: float = 0.0  # time.monotonic()


class Servers:
    """Several servers of one model. ValueError when one is missing, refuses, or does not serve it."""

    def __init__(
        self,
        urls: list[str],
        model: str | None,  # None: the one that they serve
        sampling: Sampling,  # sent with every request; every turn of every conversation has a seed made from its own
        api_key: str | None = None,
        concurrency: int = 32,  # requests at a time for each server
        timeout_s: float = 600.0,  # of one request
        retries: int = 6,
        backoff_s: float = 1.0,  # before the first retry; doubles
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no server's address; give it as http://host:port/v1")
        self.sampling, self.concurrency = sampling, concurrency
        self._body = sampling.chosen() | {"max_tokens": sampling.max_new_tokens} | (sampling.extra_body or {})
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY and concurrency * len(urls) + SPARE_FILES > files:
            raise ValueError(
                f"{len(urls)} servers with {concurrency} requests each need more than {files} open files; "
                "raise it (ulimit -n) or lower --concurrency"
            )
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = asyncio.run(self._agreed_model(model))

    def settings(self) -> dict[str, Any]:
        """What decides the answers besides the sampling."""
        return {"backend": "server", "model": self.model}

    def about(self) -> str:
        return f"{self.model}, {self.concurrency} requests at a time for each of {', '.join(self.urls)}"

    def answer(self, job: Job) -> None:
        """Answers all that is to do. Stopped: on SIGINT or SIGTERM. ValueError: no server answers any more."""
        asyncio.run(self._answer(job))

    async def _answer(self, job: Job) -> None:
        loop, got = asyncio.get_running_loop(), []
        work = asyncio.create_task(self._all(job))

        def stop(number: int) -> None:
            got.append(number)
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        try:
            await work
        except asyncio.CancelledError:
            if not got:
                raise
            raise Stopped(got[0]) from None
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _all(self, job: Job) -> None:
        servers = [Server(url, asyncio.Semaphore(self.concurrency)) for url in self.urls]
        todo = (dialogue for dialogue in job.dialogues() if not job.has(dialogue))
        async with self._client() as client, asyncio.TaskGroup() as group:
            for home in servers * self.concurrency:
                group.create_task(self._work(client, servers, home, job, todo))

    async def _work(
        self, client: httpx.AsyncClient, servers: list[Server], home: Server, job: Job, todo: Iterator[Dialogue]
    ) -> None:
        """One conversation after the other, all its turns at `home`, which has its beginning cached, while that answers."""
        for dialogue in todo:
            try:
                while dialogue.wants_answer():
                    message, finish_reason, tokens = await self._turn(client, servers, home, dialogue)
                    dialogue.take(message, finish_reason, tokens)
                    job.turn(tokens)
            except Unanswered as error:
                job.failed(dialogue, str(error))
            else:
                job.answered(dialogue)

    async def _turn(
        self, client: httpx.AsyncClient, servers: list[Server], home: Server, dialogue: Dialogue
    ) -> tuple[dict[str, Any], str, int]:  # message, finish_reason, completion tokens
        """One answer, from `home` or else from any. Unanswered after the last retry."""
        body = self._request(dialogue)
        silent_since, server = None, None
        for attempt in range(self.retries + 1):
            server = await _awake(servers, home, server)
            server.busy += 1
            try:
                async with server.slots:
                    answer = await self._ask(client, server.url, body)
            except Again as error:
                reason = error
            else:
                server.rests, server.answered_at = 0, time.monotonic()
                return answer
            finally:
                server.busy -= 1
            silent_since = silent_since or time.monotonic()
            if not reason.server_rests:
                if attempt < self.retries:
                    await asyncio.sleep(self._backoff_s(attempt))
            elif server.resting_until <= time.monotonic():  # of many refused at once, the first sets the time
                server.resting_until = time.monotonic() + reason.rest_s + self._backoff_s(server.rests)
                server.rests += 1
        if reason.server_rests and not any(s.answered_at > silent_since for s in servers):
            raise ValueError(
                f"no server has answered for {time.monotonic() - silent_since:.0f} s; the last: {reason}. "
                "When they do again, the same command goes on from here"
            )
        raise Unanswered(f"{reason} ({self.retries + 1} attempts)")

    def _backoff_s(self, times: int) -> float:
        return min(self.backoff_s * 2**times, LONGEST_REST_S) * random.uniform(0.5, 1)

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        body = {"model": self.model, "messages": [for_request(m) for m in dialogue.messages], **self._body}
        if dialogue.tools:
            body["tools"] = dialogue.tools
        if self.sampling.seed is not None:
            body["seed"] = (self.sampling.seed + 1_000_003 * dialogue.index + len(dialogue.finish_reasons)) % 2**31
        return body

    async def _ask(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[dict[str, Any], str, int]:
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await client.post(f"{url}/chat/completions", json=body)
        except TimeoutError:
            raise Again(f"{url}: no answer within {self.timeout_s:g} s") from None
        except httpx.RequestError as error:
            unreachable = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            raise Again(f"{url}: {_said(error)}", server_rests=unreachable) from error
        status = response.status_code
        if status == 200:
            try:
                return _completion(response)
            except ValueError as error:
                raise Again(f"{url}: {error}") from error
        reason = f"{url}: HTTP {status}: {_error_text(response)}"
        if status in AGAIN:
            raise Again(reason, status in BUSY, _retry_after_s(response))
        if status in (401, 403, 404):  # was right at the start, and will be wrong for every other request too
            raise ValueError(reason)
        raise Unanswered(reason)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=min(10.0, self.timeout_s)),  # _ask bounds the whole
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def _agreed_model(self, model: str | None) -> str:
        async with self._client() as client:
            served = await asyncio.gather(*(self._models(client, url) for url in self.urls))
        for url, names in zip(self.urls, served, strict=True):
            if model is None and len(names) != 1:
                raise ValueError(f"{url} serves {', '.join(names) or 'no model'}: say which with --model")
            model = names[0] if model is None else model
            if model not in names:
                raise ValueError(f"{url} does not serve {model}; it serves {', '.join(names) or 'no model'}")
        return model

    async def _models(self, client: httpx.AsyncClient, url: str) -> list[str]:
        try:
            async with asyncio.timeout(min(30.0, self.timeout_s)):
                response = await client.get(f"{url}/models")
        except TimeoutError:
            raise ValueError(f"{url}: no answer; is the server still starting?") from None
        except httpx.RequestError as error:
            raise ValueError(f"{url}: no server there ({_said(error)}); is it running, is the address right?") from error
        status = response.status_code
        if status in (401, 403):
            raise ValueError(f"{url} refuses the API key (HTTP {status}); set the variable that --api-key-env names")
        if status == 404:
            raise ValueError(f"{url}/models is not there (HTTP 404); does the address end in /v1?")
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}: {_error_text(response)}")
            return [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{url}/models: not an OpenAI-compatible server's answer: {_said(error)}") from error


def parse_extra_body(text: str | None) -> dict[str, Any] | None:
    """The object of --extra-body. ValueError when it is none, or holds what has an option of its own."""
    if text is None:
        return None
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ValueError(f"--extra-body must be a JSON object, got {text}")
    if own := [key for key in extra if key in OWN_KEYS]:
        raise ValueError(f"--extra-body must not hold {', '.join(own)}: the command sets it, or has an option for it")
    return extra


async def _awake(servers: list[Server], home: Server, last: Server | None) -> Server:
    """A server that does not rest: if possible not the last one, which failed; home, or else the least busy."""
    while True:
        now = time.monotonic()
        if awake := [s for s in servers if s.resting_until <= now]:
            return min(awake, key=lambda s: (s is last, s is not home, s.busy))
        await asyncio.sleep(min(s.resting_until for s in servers) - now)


def _completion(response: httpx.Response) -> tuple[dict[str, Any], str, int]:
    """Message, finish_reason and completion tokens. ValueError when it is no whole answer that training could read."""
    try:
        body = response.json()
        choice = body["choices"][0]
        finish_reason, message = choice["finish_reason"], answer_message(choice["message"])
        tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a chat completion: {response.text[:200]}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {response.text[:200]}") from error
    if finish_reason not in FINISHED:
        raise ValueError(f"the answer ended with finish_reason {finish_reason!r}")
    return message, finish_reason, tokens


def _error_text(response: httpx.Response) -> str:
    """What the server said is wrong, on one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        said = (error.get("message") or error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = response.text
    return " ".join(str(said).split())[:300] or response.reason_phrase


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that Retry-After asks for; a date, its other form, counts as none: the next rest is longer anyway."""
    try:
        return min(max(0.0, float(response.headers.get("Retry-After", 0))), LONGEST_RETRY_AFTER_S)
    except ValueError:
        return 0.0


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
