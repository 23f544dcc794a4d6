"""Answers from OpenAI-compatible servers (SGLang, vLLM, ...), many at once.

A server that refuses or is full rests for a time that doubles, or for what its Retry-After says, and others take over; no
server ever has more than `concurrency` requests at once.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from fastdraft.answers.capture import AnswerCapture, Ran, without_covered
from fastdraft.answers.dialogue import Dialogue, answer_message, for_request
from fastdraft.answers.job import Job, Sampling, Stopped
from fastdraft.answers.servers import (
    CONNECT_S,
    Again,
    RefusedRequest,
    backed_off,
    check_status,
    connect,
    error_text,
    get,
    lost,
    parse_fields,
    retried,
    said,
)

FINISHED = ("stop", "length", "tool_calls")  # others (abort, error, content_filter) are no whole answer
SPARE_FILES = 64  # besides one for each connection
CAPTURE_KEYS = {"kv_transfer_params", "return_token_ids"}  # of a request whose states are taken
Answer = tuple[dict[str, Any], str, int, Ran | None]  # message, finish_reason, completion tokens, what ran for it
OWN_KEYS = ("model", "messages", "tools", "stream", "n", "temperature", "top_p", "top_k", "max_tokens", "seed")


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
        capture: AnswerCapture | None = None,  # takes the states of what is answered
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no server's address; give it as http://host:port/v1")
        self.sampling, self.concurrency = sampling, concurrency
        self._body = sampling.chosen() | {"max_tokens": sampling.max_new_tokens} | (sampling.extra_body or {})
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s
        self.capture = capture
        if capture is not None and (held := CAPTURE_KEYS & (sampling.extra_body or {}).keys()):
            raise ValueError(f"--extra-body must not hold {', '.join(sorted(held))}: --capture sets it")
        if capture is not None and "stop" in (sampling.extra_body or {}):
            raise ValueError(
                "--extra-body must not hold stop: vLLM drops a request that ends at a string, and its states with it; "
                "leave --capture out and use features capture afterwards"
            )
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY and concurrency * len(urls) + SPARE_FILES > files:
            raise ValueError(
                f"{len(urls)} servers with {concurrency} requests each need more than {files} open files; "
                "raise it (ulimit -n) or lower --concurrency"
            )
        self._api_key = api_key
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
            ran: list[Ran] = []
            try:
                while dialogue.wants_answer():
                    message, finish_reason, tokens, turn = await self._turn(client, servers, home, dialogue)
                    dialogue.take(message, finish_reason, tokens)
                    job.turn(tokens)
                    ran = ran if turn is None else without_covered(ran, turn)
            except RefusedRequest as error:
                if error.status in (401, 403, 404):  # was right at the start, and will be wrong for every other request too
                    raise
                job.failed(dialogue, str(error))
            except Again as error:
                job.failed(dialogue, f"{error} ({self.retries + 1} attempts)")
            else:
                if self.capture is not None:
                    await self.capture.keep(dialogue.row(), ran, dialogue.conversation.where)
                job.answered(dialogue)

    async def _turn(self, client: httpx.AsyncClient, servers: list[Server], home: Server, dialogue: Dialogue) -> Answer:
        """One answer, from `home` or else from any. Again: not after the last retry. ValueError: no server answers."""
        body = self._request(dialogue)
        silent_since, server = None, None

        async def ask(_attempt: int) -> Answer:
            nonlocal silent_since, server
            server = await _awake(servers, home, server)
            server.busy += 1
            try:
                async with server.slots:
                    answer = await self._ask(client, server.url, body)
            except Again as error:
                silent_since = silent_since or time.monotonic()
                if error.server_rests and server.resting_until <= time.monotonic():  # of many at once the first
                    server.resting_until = time.monotonic() + error.rest_s + backed_off(self.backoff_s, server.rests)
                    server.rests += 1
                raise
            finally:
                server.busy -= 1
            server.rests, server.answered_at = 0, time.monotonic()
            return answer

        try:
            return await retried(ask, self.retries, self.backoff_s)
        except Again as error:
            if error.server_rests and not any(s.answered_at > silent_since for s in servers):
                raise ValueError(
                    f"no server has answered for {time.monotonic() - silent_since:.0f} s; the last: {error}. "
                    "When they do again, the same command goes on from here"
                ) from error
            raise

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        body = {"model": self.model, **for_request(dialogue.messages, dialogue.tools), **self._body}
        if self.sampling.seed is not None:
            body["seed"] = (self.sampling.seed + 1_000_003 * dialogue.index + len(dialogue.finish_reasons)) % 2**31
        return body

    async def _ask(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
        asked = None if self.capture is None else await self.capture.ask(url)
        turn, answer = None, None
        try:
            message, finish_reason, tokens, answer = await self._answered(
                client, url, body if asked is None else body | asked.fields
            )
        finally:
            if asked is not None:
                turn = await self.capture.take(asked, answer)
        return message, finish_reason, tokens, turn

    async def _answered(
        self, client: httpx.AsyncClient, url: str, body: dict[str, Any]
    ) -> tuple[dict[str, Any], str, int, dict[str, Any]]:  # message, finish_reason, completion tokens, all that was said
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await client.post(f"{url}/chat/completions", json=body)
        except TimeoutError:
            raise Again(f"{url}: no answer within {self.timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise lost(error) from error
        check_status(response)
        try:
            return _completion(response)
        except ValueError as error:
            raise Again(f"{url}: {error}") from error

    def _client(self) -> httpx.AsyncClient:
        return connect(self._api_key, connect_s=min(CONNECT_S, self.timeout_s))

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
        response = await get(client, f"{url}/models", min(30.0, self.timeout_s))
        status = response.status_code
        if status == 404:
            raise ValueError(f"{url}/models is not there (HTTP 404); does the address end in /v1?")
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}: {error_text(response)}")
            return [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{url}/models: not an OpenAI-compatible server's answer: {said(error)}") from error


def parse_extra_body(text: str | None) -> dict[str, Any] | None:
    return None if text is None else parse_fields(text, "--extra-body", OWN_KEYS)


async def _awake(servers: list[Server], home: Server, last: Server | None) -> Server:
    """A server that does not rest: if possible not the last one, which failed; home, or else the least busy."""
    while True:
        now = time.monotonic()
        if awake := [s for s in servers if s.resting_until <= now]:
            return min(awake, key=lambda s: (s is last, s is not home, s.busy))
        await asyncio.sleep(min(s.resting_until for s in servers) - now)


def _completion(response: httpx.Response) -> tuple[dict[str, Any], str, int, dict[str, Any]]:
    """Message, finish_reason, completion tokens, all that was said. ValueError: no whole answer that training can read."""
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
    return message, finish_reason, tokens, body
