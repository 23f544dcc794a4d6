"""Answers and features in one pass: the states that a server computed while it answered go into a feature store.

A server of `serve-target` gives the states of a prompt and of what it generates, for the ids that it ran. Training reads
other ids, perhaps: those that the chat template and the tokenizer make of the finished conversation. So a document is
stored when those ids are the server's up to the last one whose states any loss reads, and is left out otherwise; whoever
reads the store asks for the states of what is left out again.

# T tokens of a prompt and its answer but for the last one, B boundaries, Ht target hidden
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdraft.answers.dialogue import Dialogue
from fastdraft.batch import Batch
from fastdraft.data.conversations import BadLine, Line, parse
from fastdraft.data.samples import Sample
from fastdraft.data.tokenize import ChatTokenizer
from fastdraft.features.store import SHARD_BYTES, Store, document_keys, list_shards, needed, shard_number
from fastdraft.features.writer import ShardWriter
from fastdraft.target.served.links import NotYet
from fastdraft.target.served.source import AskedAnswer, ServedSource


@dataclass(frozen=True)
class Ran:
    """What a server ran for one answer."""

    ids: np.ndarray  # [T] int32
    rows: Tensor  # [T, B, Ht] on the host


class AnswerCapture:
    """Takes the states of answers and writes those of finished conversations; a context manager, which writes the rest."""

    def __init__(
        self,
        source: ServedSource,
        store: Store,
        chat: ChatTokenizer,
        mask_token: int | None = None,  # of a draft of blocks: no document may have it
    ):
        self.source, self.store, self.chat = source, store, chat
        self.mask_token = mask_token
        self.stored = 0  # documents of this run
        self.missed: str | None = None  # why an answer came without its states, the last time
        self._writer = ShardWriter(store.folder, store.meta)
        self._number = max(map(shard_number, list_shards(store.folder)), default=-1) + 1
        self._written: set[bytes] = set()
        self._worker = ThreadPoolExecutor(1, "answers-to-store")

    def __enter__(self) -> AnswerCapture:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Also what a signal or an error ended is written, because its conversations are in the file of answers."""
        self._worker.shutdown()
        if self._writer.open_bytes:
            self._writer.finish(self._number)
        self._writer.close()

    async def ask(self, url: str) -> AskedAnswer | None:
        """Before a request for an answer, whose body then also needs the `fields` of what is returned."""
        try:
            return await self.source.ask_answer(url)
        except NotYet as error:
            self.missed = str(error)
            return None

    async def take(self, asked: AskedAnswer, answer: dict[str, Any] | None) -> Ran | None:
        """After it; None where its states did not come, which the answer does not suffer from."""
        try:
            rows = await self.source.take_answer(asked, answer)
            ids = np.array([*answer["prompt_token_ids"], *answer["choices"][0]["token_ids"]][:-1], np.int32)
        except NotYet as error:
            self.missed = self.missed if answer is None else str(error)
            return None
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{asked.server.url} does not say which ids it ran ({error!r})") from error
        if len(rows) != len(ids):
            raise ValueError(f"{asked.server.url} handed over the states of {len(rows)} tokens, and ran {len(ids)}")
        return Ran(ids, rows)

    async def keep(
        self,
        row: dict[str, Any],
        turns: list[Ran],  # of those turns whose states came
        where: str,  # the prompt's FILE:LINE
    ) -> None:
        """Stores the documents that training will make of a finished conversation, as far as their states are there.

        ValueError where one has the draft's mask token: training would refuse the whole file of answers.
        """
        await asyncio.get_running_loop().run_in_executor(self._worker, self._keep, row, turns, where)

    def _keep(self, row: dict[str, Any], turns: list[Ran], where: str) -> None:
        try:
            samples = self.chat(parse(Line(where, json.dumps(row).encode()))).samples
        except BadLine:  # whoever reads the finished file names it, or skips it where data.on_bad_line says so
            return
        if self.mask_token is not None and any((s.input_ids == self.mask_token).any() for s in samples):
            raise ValueError(
                f"the conversation of {where} has, with its answers, token {self.mask_token}, which is the draft's "
                "mask_token_id: a block would read it as a token still to be drafted. Choose an id that no text of yours "
                "has with draft.overrides.mask_token_id; the same command then goes on behind what is answered"
            )
        for sample in samples:
            self._keep_document(sample, turns)
        if self._writer.open_bytes >= SHARD_BYTES:
            self._writer.finish(self._number)
            self._number += 1

    def _keep_document(self, sample: Sample, turns: list[Ran]) -> None:
        ids, mask = torch.from_numpy(sample.input_ids.astype(np.int64)), torch.from_numpy(sample.loss_mask.copy())
        batch = Batch(ids, mask, (len(ids),))
        read, key = needed(batch), document_keys(batch)[0]
        count = max(read.g_rows[0], int(read.f_index[-1]) + 1)  # the tokens whose states a loss reads are the first ones
        ran = (t for t in turns if len(t.ids) >= count and np.array_equal(t.ids[:count], sample.input_ids[:count]))
        turn = next(ran, None)
        if turn is None or key in self._written or key in self.store.place:
            return
        rows = turn.rows.new_zeros(len(ids), *turn.rows.shape[1:])
        rows[:count] = turn.rows[:count]
        self._writer.add(batch, self.source.features(rows), [0])
        self._written.add(key)
        self.stored += 1


def refuse_masked_prompts(
    dialogues: Iterable[Dialogue],  # nothing answered yet
    chat: ChatTokenizer,
    token: int,  # of the draft
) -> None:
    """ValueError where a document has the draft's mask token before its first answer, whatever that will be.

    Each conversation is tokenised as training will do it, with one word for the answer.
    """
    for dialogue in dialogues:
        if not dialogue.wants_answer():
            continue
        conversation, answer = dialogue.conversation, {"role": "assistant", "content": "yes"}
        asked = replace(conversation, messages=(*dialogue.messages, answer))
        try:
            samples = chat(asked).samples
        except BadLine:  # as when the conversation is finished
            continue
        if any(((s.input_ids == token) & ~s.loss_mask).any() for s in samples):
            raise ValueError(
                f"{conversation.where} has token {token}, which is the draft's mask_token_id: a block would read it as a "
                "token still to be drafted. Leave that prompt out, or choose an id that no text of yours has with "
                "draft.overrides.mask_token_id"
            )


def without_covered(
    turns: list[Ran],
    last: Ran,
) -> list[Ran]:
    """A conversation's turns with one more, and without those whose tokens that one begins with: in a conversation that
    grows at its end alone the last turn has the states of all."""
    left = [t for t in turns if not np.array_equal(t.ids, last.ids[: len(t.ids)])]
    return [*left, last]
