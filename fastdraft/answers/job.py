"""A regeneration under way: which conversations are to be answered, where answers go, how far it is."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastdraft.answers.dialogue import Dialogue
from fastdraft.answers.file import AnswerFile
from fastdraft.data.conversations import BadLine, Line, parse, read_lines

SAY_EVERY_S = 30.0  # a line of progress where there is no terminal to draw on
HOPELESS = 50  # failures in a row


@dataclass(frozen=True)
class Sampling:
    """None is the model's own default: its generation_config.json, as a server or transformers reads it."""

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 2048  # for each answer
    seed: int | None = None
    extra_body: dict[str, Any] | None = None  # further keys of a request; for a local target chat_template_kwargs alone

    def chosen(self) -> dict[str, float]:
        """What of temperature, top_p and top_k is not left to the model."""
        return {name: x for name in ("temperature", "top_p", "top_k") if (x := getattr(self, name)) is not None}


class Stopped(Exception):
    """A signal asked for an end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class PromptFiles:
    """The files of prompts. Lines are looked through once before anything is asked."""

    files: list[str]
    hashes: list[str] = field(default_factory=list)  # of the files' content
    num_conversations: int = 0
    bad_lines: list[str] = field(default_factory=list)  # FILE:LINE: reason

    def survey(self, skip_bad_lines: bool) -> None:
        """Hashes and counts. BadLine for the first line that cannot be answered, unless they are skipped."""
        for path in self.files:
            with open(path, "rb") as file:
                self.hashes.append(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
            for line in read_lines(path):
                try:
                    _dialogue(0, line)
                    self.num_conversations += 1
                except BadLine as error:
                    if not skip_bad_lines:
                        raise
                    self.bad_lines.append(str(error))

    def dialogues(self) -> Iterator[Dialogue]:
        """All conversations, nothing answered yet. Lines that cannot be used have their index too, and are left out."""
        index = 0
        for path in self.files:
            for line in read_lines(path):
                with suppress(BadLine):  # reported by survey
                    yield _dialogue(index, line)
                index += 1


class Job:
    """What the two ways of answering work on. A context manager that shows progress.

    ValueError after HOPELESS failures in a row, unless failures are allowed.
    """

    def __init__(self, source: PromptFiles, file: AnswerFile, console: Console, allow_failures: bool) -> None:
        self._source, self._file, self._console, self._allow = source, file, console, allow_failures
        self.failures: dict[str, dict] = {}  # by id
        self.tokens = 0  # of this run, as the next two
        self._answered, self._in_a_row = 0, 0
        self._start = self._said = time.monotonic()
        self._before = len(file.rows)
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=source.num_conversations, completed=self._before)

    def __enter__(self) -> Job:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def dialogues(self) -> Iterator[Dialogue]:
        """All conversations, also those that have their row."""
        return self._source.dialogues()

    def has(self, dialogue: Dialogue) -> bool:
        return dialogue.index in self._file.rows

    def turn(self, completion_tokens: int) -> None:
        """One turn was answered."""
        self.tokens += completion_tokens
        self._show()

    def answered(self, dialogue: Dialogue) -> None:
        self._file.append(dialogue.row())
        self._answered, self._in_a_row = self._answered + 1, 0
        self._show()

    def failed(self, dialogue: Dialogue, reason: str) -> None:
        place = {"where": dialogue.conversation.where, "answer": len(dialogue.finish_reasons) + 1}
        self.failures[dialogue.id] = {"id": dialogue.id, **place, "reason": reason}
        self._in_a_row += 1
        if self._in_a_row >= HOPELESS and not self._allow:
            raise ValueError(f"{HOPELESS} conversations in a row failed, the last: {reason}")
        self._show()

    def status(self) -> str:
        """One line: done of how many, tokens/s and time left by this run's speed."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done, total = self._before + self._answered, self._source.num_conversations
        failed = f", {len(self.failures):,} failed" if self.failures else ""
        left = seconds / self._answered * (total - done - len(self.failures)) if self._answered else None
        eta = "" if left is None else f", {timedelta(seconds=round(left))} left"
        return f"{done:,}/{total:,} conversations{failed}, {self.tokens / seconds:,.0f} tokens/s{eta}"

    def _show(self) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._before + self._answered, description=self.status())
        elif time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            self._console.print(self.status(), markup=False, highlight=False, soft_wrap=True)


def _dialogue(index: int, line: Line) -> Dialogue:
    """BadLine: not a conversation, or nothing in it is to be answered."""
    conversation = parse(line, prompts=True)
    if conversation.input_ids is not None:
        raise BadLine(line.where, "has token ids; only messages, conversations or a prompt can be answered")
    if not Dialogue(index, conversation).wants_answer():
        raise BadLine(line.where, "nothing to answer: it has no user's turn")
    return Dialogue(index, conversation)
