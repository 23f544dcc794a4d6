"""Features from vLLM servers that `fastdraft serve-target` started.

Each document goes out as one request of one token. Its states come back as a file in shared memory from a server of this
host, and over TCP from one of another (`links.py`). A pack's rows are read into one staging buffer (page-locked where
there is a GPU), sent to the device on a stream of its own, and split there into g and the state before the final norm. From
that the target's own norm makes f. A thread with an event loop does this for the packs to come, at most `AHEAD` of which
are under way.

What a server says of itself (`feature_server.py`) is compared with the run before the first step and again after each
restart, and a few probes prove that its states and this process's head give its own log-probabilities. A failed request is
tried again, at another server if there is one, until nothing has come for `timeout_s`.

# N packed tokens, S states that a server hands over, K layers that the draft reads, Ht target hidden
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor

from fastdraft.batch import Batch, Features
from fastdraft.model.precision import DTYPES
from fastdraft.target.served.connector.fastdraft_handover import read_server, remove_dead
from fastdraft.target.served.ends import FileEnds
from fastdraft.target.served.feature_server import (
    About,
    FeatureServer,
    Wanted,
    answer_of,
    complete,
    describe,
    open_server,
    refuse_other_server,
)
from fastdraft.target.served.links import Connection, Link, NotYet, Place, SharedMemory
from fastdraft.target.source import Source

AHEAD = 2  # packs under way or waiting to be trained on
LONGEST_WAIT_S = 30.0  # between two attempts
SILENT_S = 5.0  # of failures of a server until the user is told
SLOW_S = 60.0  # of waiting for a pack, though no server failed, until the user is told
PROBES = 8
ANSWERS, ANSWER_TOKENS = 4, 32  # that are drawn to compare their states with those of the same ids as a document
SAME = 0.3  # of a row's size: what other kernels may change in bf16; a row of another token is off by about 1
TOP = 5  # log-probabilities compared of each probe
NEAR = 0.02  # of the largest logit: what bf16 may change, as for a target in this process

T = TypeVar("T")


@dataclass(frozen=True)
class AskedAnswer:
    """A request for an answer and its states, between the question and the answer."""

    server: FeatureServer
    about: About
    link: Link
    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """What the request needs for it, besides what it asks."""
        return {"kv_transfer_params": {"states": self.name, "answer": True}, "return_token_ids": True}


class ServedSource(Source):
    """A target that servers run. ValueError when one of them is not what the run needs, or gives other numbers."""

    def __init__(
        self,
        urls: Sequence[str],
        file_ends: FileEnds,
        wanted: Wanted,
        first: int = 0,  # the server that this process asks first
        timeout_s: float = 600.0,
    ):
        self.wanted, self.timeout_s = wanted, timeout_s
        self.ends, self.norm = file_ends.ends, file_ends.norm
        self.device, self.dtype = self.ends.device, self.ends.dtype
        self.notes: list[str] = []
        self.repeated = 0  # requests that were sent again
        self.servers: list[FeatureServer] = []
        self._boundaries = wanted.boundaries  # of staged rows
        self._state_dtype = DTYPES[wanted.dtype]
        self._turn, self._number = first, 0
        self._folders: dict[str, SharedMemory] = {}  # by path: those of this host that servers write into
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._coming: dict[int, Future[_Read]] = {}  # by id of the batch
        self._room = asyncio.Semaphore(AHEAD)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served-features", daemon=True)
        self._thread.start()
        try:
            self._run(self._open(urls))
        except BaseException:
            self.close()
            raise

    # --- a source ------------------------------------------------------------------------------------------------------

    def expect(self, batches: list[Batch]) -> None:
        for batch in batches:
            self._coming[id(batch)] = asyncio.run_coroutine_threadsafe(self._read_when_room(batch), self._loop)

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        start = time.perf_counter()
        coming = self._coming.pop(id(batch), None)
        if coming is None:
            read = self._wait_for(asyncio.run_coroutine_threadsafe(self._read(batch), self._loop))
        else:
            try:
                read = self._wait_for(coming)
            finally:
                self._loop.call_soon_threadsafe(self._room.release)
        self.waited += time.perf_counter() - start
        if read.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(read.ready)
            read.rows.record_stream(current)
        return batch, self._features(read.rows)

    def _wait_for(self, coming: Future[_Read]) -> _Read:
        start, told = time.monotonic(), False
        while not wait([coming], timeout=1).done:
            seconds = time.monotonic() - start
            self.while_waiting(seconds)
            if seconds > SLOW_S and not told and not any(server.told for server in self.servers):
                told = True
                asked = ", ".join(f"{server.url} has {server.busy}" for server in self.servers)
                self.say(
                    f"states of a pack have been waited for {seconds:.0f} s, and no request has failed: of those of this "
                    f"process {asked} under way"
                )
        return coming.result()

    def counts(self) -> dict[str, int]:
        return {"requests_repeated": self.repeated} if self.repeated else {}

    def close(self) -> None:
        """Gives up what is under way, and leaves no file of this process in any folder."""
        if self._loop.is_closed():
            return
        self._run(self._give_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for folder in self._folders.values():
            folder.close()

    async def _give_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in self.servers:
            await server.client.aclose()
            if isinstance(server.link, Connection):
                server.link.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- a pack --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _features(
        self,
        rows: Tensor,  # [N, B, Ht] at `_boundaries`
    ) -> Features:
        places = [self._boundaries.index(layer + 1) for layer in self.wanted.layers]
        f = self.norm(rows[:, -1].to(self.dtype)).to(self.dtype)
        # The layers ascend, so their states lie side by side but for the case that the last one is the last layer's.
        return Features(rows[:, : places[-1] + 1].reshape(len(rows), -1).to(self.dtype), f)

    async def _read_when_room(self, batch: Batch) -> _Read:
        await self._room.acquire()
        return await self._read(batch)

    async def _read(self, batch: Batch) -> _Read:
        """Asks for a pack's documents, all at once, and waits for them."""
        if not 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < len(self.ends.embedding):
            raise ValueError(
                f"a document holds a token outside of the target's {len(self.ends.embedding)}; is it another tokenizer's?"
            )
        shape = batch.num_tokens, len(self._boundaries), self.wanted.hidden_size
        staged = torch.empty(shape, dtype=self._state_dtype, pin_memory=self._stream is not None)
        documents = zip(batch.input_ids.split(batch.lengths), staged.split(batch.lengths), strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                for ids, rows in documents:
                    group.create_task(self._fetch(ids.tolist(), rows))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self._stream is None:
            return _Read(staged, None)
        with torch.cuda.stream(self._stream):
            rows = staged.to(self.device, non_blocking=True)
            return _Read(rows, self._stream.record_event())

    # --- a document ----------------------------------------------------------------------------------------------------

    async def _fetch(
        self,
        ids: list[int],
        rows: Tensor,  # [len(ids), B, Ht] on the host, to be filled
    ) -> None:
        """Fills in a document's states. ValueError when a server refuses it, or none gave it for `timeout_s`."""
        began, last, failed, asked = math.inf, None, set(), 0
        while True:
            server = await self._pick(last)
            try:
                async with server.slots:
                    began = min(began, time.monotonic())
                    await self._ask(server, ids, rows)
            except NotYet as error:
                last, asked = server, asked + 1
                failed.add(server.url)
                self._rest(server, str(error))
                self.repeated += 1
                # A server that hangs takes all of the time: then the others are asked once, too. One that answered, and
                # whose states were lost on their way, is asked once more.
                again = asked == len(self.servers) and not isinstance(error.__cause__, httpx.TimeoutException)
                if time.monotonic() - began > self.timeout_s and len(failed) == len(self.servers) and not again:
                    others = f" nor did {len(self.servers) - 1} others" if len(self.servers) > 1 else ""
                    raise ValueError(
                        f"{server.url} gave no states of a document of {len(ids)} tokens for {self.timeout_s:g} s{others}; "
                        f"the last reason: {error}. When it does again, the same command goes on from the last checkpoint"
                    ) from error
            else:
                self._wake(server)
                return
            finally:
                server.busy -= 1

    async def _pick(self, last: FeatureServer | None) -> FeatureServer:
        """The server with the fewest requests of this process among those that do not rest, each in turn; after a failure
        another one if possible. Waits where all rest."""
        while not (awake := [s for s in self.servers if s.resting_until <= time.monotonic()]):
            await asyncio.sleep(max(0.0, min(s.resting_until for s in self.servers) - time.monotonic()))
        turn = self._turn % len(self.servers)
        order = self.servers[turn:] + self.servers[:turn]
        chosen = min((s for s in order if s in awake), key=lambda s: (s is last, s.busy))
        self._turn += 1
        chosen.busy += 1
        return chosen

    def _rest(self, server: FeatureServer, why: str) -> None:
        now = time.monotonic()
        if server.resting_until <= now:  # of many failures at once the first
            server.resting_until = now + min(0.25 * 2**server.failures, LONGEST_WAIT_S)
            server.failures += 1
        if server.failing_since is None:
            server.failing_since = now
        elif now - server.failing_since > SILENT_S and not server.told:
            server.told = True
            others = "the others are asked meanwhile" if len(self.servers) > 1 else "this process waits"
            self.say(
                f"{server.url} has given no states for {now - server.failing_since:.0f} s: {why}. It is asked again, and "
                f"{others}; once no server has given a document's for target.timeout_s={self.timeout_s:g} s the run ends"
            )

    def _wake(self, server: FeatureServer) -> None:
        if server.told:
            self.say(f"{server.url} gives states again, after {time.monotonic() - server.failing_since:.0f} s")
        server.failures, server.resting_until = 0, 0.0
        server.failing_since, server.told = None, False

    async def _ask(self, server: FeatureServer, ids: list[int], rows: Tensor, **more: Any) -> dict[str, Any]:
        """One request for a document's states, which are read into `rows`. The server's answer."""
        about, link, name = await self._name(server)
        states = len(about.boundaries)
        whole = rows if states == rows.shape[1] else rows.new_empty(len(rows), states, rows.shape[2])
        link.expect(name, Place(whole))
        try:
            answer = await complete(server, ids, {"kv_transfer_params": {"states": name}, **more})
            _refuse_restarted(server, about, answer)
            if (said := answer["usage"]["prompt_tokens"]) != len(ids):
                raise ValueError(
                    f"{server.url} read {said} tokens of a document of {len(ids)}; it must take ids as they are"
                )
            await link.take(name, self.timeout_s)
        except (KeyError, TypeError) as error:
            raise NotYet(f"{server.url} does not answer as vLLM does ({error!r})") from error
        finally:
            link.forget(name)
        if whole is not rows:
            rows.copy_(whole[:, [about.boundaries.index(b) for b in self._boundaries]])
        return answer

    async def _name(self, server: FeatureServer) -> tuple[About, Link, str]:
        """What a server is, compared since its last start, how its states come, and a name for one request's."""
        async with server.comparing:
            if server.about is None or not server.link.is_open():
                about = await describe(server)
                await self._accept(server, about)
        self._number += 1
        return server.about, server.link, f"{server.link.client}-{self._number}"

    # --- an answer -----------------------------------------------------------------------------------------------------

    async def ask_answer(self, url: str) -> AskedAnswer:
        """Prepares a request to one of the servers, which somebody else sends. NotYet where it cannot be compared now."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask_answer(url), self._loop))

    async def take_answer(self, asked: AskedAnswer, answer: dict[str, Any] | None) -> Tensor:  # [T, B, Ht] on the host
        """The states of a prompt and of its answer but for the last token, at the boundaries of this run.

        It is called once for each `ask_answer`, with what the server answered or None where it did not. NotYet: there are
        none this time.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._take_answer(asked, answer), self._loop))

    async def _ask_answer(self, url: str) -> AskedAnswer:
        base = url.rstrip("/").removesuffix("/v1")
        server = next(server for server in self.servers if server.url == base)
        about, link, name = await self._name(server)
        row_bytes = len(about.boundaries) * self.wanted.hidden_size * self._state_dtype.itemsize
        link.expect(name, Place(largest=about.max_model_len * row_bytes))
        return AskedAnswer(server, about, link, name)

    async def _take_answer(self, asked: AskedAnswer, answer: dict[str, Any] | None) -> Tensor:
        try:
            if answer is None:
                raise NotYet(f"{asked.server.url} gave no answer")
            if (text := _stopped_at(answer)) is not None:
                raise NotYet(f"{asked.server.url} ended an answer at the string {text!r}, where vLLM drops the states")
            _refuse_restarted(asked.server, asked.about, answer)
            content = await asked.link.take(asked.name, self.timeout_s)
        finally:
            asked.link.forget(asked.name)
        boundaries = asked.about.boundaries
        try:
            rows = content.view(self._state_dtype).view(-1, len(boundaries), self.wanted.hidden_size)
        except RuntimeError:
            raise ValueError(
                f"{asked.server.url} handed over {len(content):,} bytes, which are no rows of states"
            ) from None
        return rows[:, [boundaries.index(b) for b in self._boundaries]]

    def features(
        self,
        rows: Tensor,  # [T, B, Ht] of `take_answer`
    ) -> Features:  # on the device
        return self._features(rows.to(self.device))

    # --- a server ------------------------------------------------------------------------------------------------------

    async def _open(self, urls: Sequence[str]) -> None:
        for url in urls:
            server = await open_server(url, os.environ.get("OPENAI_API_KEY"), self.timeout_s)
            self.servers.append(server)
            try:
                await self._accept(server, server.about)
            except NotYet as error:
                raise ValueError(str(error)) from error
            await self._prove(server)
        named = ", ".join(f"{s.url} (vLLM {s.about.vllm}{_far(s)})" for s in self.servers)
        self.notes.append(f"the target runs in {named}, in {self.wanted.dtype}")

    async def _accept(self, server: FeatureServer, about: About) -> None:
        """Refuses a server that is another than the run needs, and makes this process known to it: in its folder where that
        is on this host, else over TCP."""
        refuse_other_server(server.url, about, self.wanted)
        if read_server(about.folder).get("instance") == about.instance:
            link = self._folders.get(about.folder) or self._enter(server.url, about.folder)
        elif about.states_port is not None:
            link = await Connection(server.url, about.states_port, about.token).open()
        else:
            raise ValueError(
                f"{server.url} hands states over in {about.folder}, which is not on this host or not readable: a trainer "
                "on its server's host runs as the same user, and containers share /dev/shm; for a trainer on another host "
                "start the server with --states-port"
            )
        if isinstance(server.link, Connection):
            server.link.close()
        server.about, server.link = about, link

    def _enter(self, url: str, folder: str) -> SharedMemory:
        try:
            left = remove_dead(folder)
            self._folders[folder] = SharedMemory(url, folder)
        except OSError as error:
            raise ValueError(f"{folder} of {url} cannot be written ({error.strerror}); run as its user") from error
        if left:
            self.notes.append(f"{left} files of states that ended runs had left in {folder} were removed")
        return self._folders[folder]

    def prove_answers(self, sampling: Mapping[str, float]) -> None:
        """ValueError where a server's states of answers, drawn as `sampling` says, are not those of the ids it names.

        Tensor-parallel processes that draw for themselves may go on with different tokens, and the rows behind are then no
        text's. A few answers are drawn, and their ids run again as documents, which see nothing of the prefix cache.
        """
        self._run(self._prove_answers(sampling))

    async def _prove_answers(self, sampling: Mapping[str, float]) -> None:
        for server in self.servers:
            try:
                off = await asyncio.gather(*(self._answer_off(server, i, sampling) for i in range(ANSWERS)))
            except NotYet as error:
                raise ValueError(f"{server.url} failed at an answer to compare: {error}") from error
            worst = next((share for share in off if math.isnan(share)), max(off))  # `max` may pass over a NaN
            if not worst <= SAME:
                raise ValueError(
                    f"{server.url} gives states of an answer that are {worst:.0%} away from those of the same ids as a "
                    "document: the tokens that it ran are not those that it names, as with tensor-parallel processes of "
                    "vLLM's build for CPUs when they draw; leave --capture out and use features capture afterwards, or ask "
                    "with --temperature 0"
                )

    async def _answer_off(self, server: FeatureServer, i: int, sampling: Mapping[str, float]) -> float:
        """How far the later half of an answer's states is from the same ids' as a document, by a row's size."""
        ids = self._probe_ids(i, min(4 + 5 * i, self.wanted.max_length // 2))
        asked = await self._ask_answer(server.url)
        count = min(ANSWER_TOKENS, self.wanted.max_length - len(ids))
        body = {"model": server.model, "prompt": ids, "max_tokens": count, "ignore_eos": True, **sampling, **asked.fields}
        try:
            answer = await answer_of(server, "/v1/completions", body)
        except (NotYet, ValueError):
            asked.link.forget(asked.name)
            raise
        ran = await self._take_answer(asked, answer)
        ids = [*ids, *answer["choices"][0]["token_ids"]][:-1]
        again = torch.empty(len(ids), *ran.shape[1:], dtype=self._state_dtype)
        await self._ask(server, ids, again, cache_salt=f"{asked.name}-again")
        if len(ran) != len(ids):
            raise ValueError(f"{server.url} handed over the states of {len(ran)} tokens, and ran {len(ids)}")
        last = slice(-(count // 2 + 1), None)
        return float(((ran - again)[last].float().norm(dim=-1) / again[last].float().norm(dim=-1)).mean())

    def _probe_ids(self, i: int, length: int) -> list[int]:
        return [(7 + 7919 * i + 104729 * k) % len(self.ends.embedding) for k in range(length)]

    async def _prove(self, server: FeatureServer) -> None:
        """ValueError unless the states of a few probes, by this process's norm and head, give the server's own
        log-probabilities of its likeliest next tokens: then the ids, the order of the states, the final norm, and the
        head's scale and cap are the server's."""
        for i in range(PROBES):
            length = min(4 + 5 * i, self.wanted.max_length)
            ids = self._probe_ids(i, length)
            rows = torch.empty(length, len(self._boundaries), self.wanted.hidden_size, dtype=self._state_dtype)
            more = {"logprobs": TOP, "return_tokens_as_token_ids": True, "return_token_ids": True}
            try:
                choice = (await self._ask(server, ids, rows, **more))["choices"][0]
                top = choice["logprobs"]["top_logprobs"][0]
                told = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
            except (NotYet, KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(f"{server.url} failed at a probe of {length} tokens: {error}") from error
            if choice.get("prompt_token_ids") not in (None, ids):
                raise ValueError(f"{server.url} changed the ids of a probe: {choice['prompt_token_ids'][:8]} for {ids[:8]}")
            logits = self.ends.head.logits(self._features(rows.to(self.device)).f[-1:])[0].float()
            ours, largest = logits.log_softmax(-1).cpu(), float(logits.abs().max())
            off = max(abs(float(ours[token]) - value) for token, value in told.items())
            if not off <= NEAR * largest:
                raise ValueError(
                    f"{server.url} gives log-probabilities up to {off:.3g} away from what its states and the head of "
                    f"target.path give, where logits reach {largest:.3g}: this vLLM computes the target otherwise between "
                    "its last layer and its logits, so every teacher would be wrong; please report the model"
                )


@dataclass
class _Read:
    rows: Tensor  # [N, B, Ht]
    ready: torch.cuda.Event | None


def _stopped_at(answer: dict[str, Any]) -> str | None:
    """The string at which an answer ended, where one did; ids that end one leave their id there."""
    choices = answer.get("choices") or [{}]
    reason = choices[0].get("stop_reason") if isinstance(choices[0], dict) else None
    return reason if isinstance(reason, str) else None


def _refuse_restarted(server: FeatureServer, about: About, answer: dict[str, Any]) -> None:
    """NotYet where a server that was not compared gave the answer, or none that `serve-target` started."""
    if (answer.get("kv_transfer_params") or {}).get("instance") != about.instance:
        if server.about is about:
            server.about = None
        raise NotYet(f"{server.url} was restarted")


def _far(server: FeatureServer) -> str:
    return f", states over TCP from {server.link.place}" if isinstance(server.link, Connection) else ""
