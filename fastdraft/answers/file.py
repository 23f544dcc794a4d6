"""What a regeneration keeps on disk, so that it can be killed anywhere and go on.

OUT.jsonl            the finished rows in the order of the input; written whole, then renamed into place
OUT.jsonl.part       rows in the order they were finished, each appended as soon as it is
OUT.jsonl.meta.json  the settings they were made with; rows of other settings are never mixed in
OUT.failures.jsonl   what could not be answered in the last run, and why
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdraft.files import hold, write_file


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that an earlier regeneration into `out` was made with; empty when there was none."""
    return (_read_meta(_meta_file(out)) or {}).get("settings", {})


def _meta_file(out: Path) -> Path:
    return out.with_name(out.name + ".meta.json")


class AnswerFile:
    """Rows by index, finished in this run or an earlier one. A context manager: one process at a time may hold it.

    ValueError: another process holds it; the files are there without their settings, or were made with other ones.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],  # that decide what is answered, in JSON's types
        about: dict[str, Any],  # what else is worth knowing
        fresh: bool = False,  # delete what is there
    ) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".part")
        self.meta = _meta_file(out)
        self.failures = out.with_name(out.name.removesuffix(".jsonl") + ".failures.jsonl")
        self.settings, self._about = settings, about
        self.rows: dict[int, tuple[Path, int]] = {}  # the file of each, and its first byte there
        self.tally = {"conversations": 0, "completion_tokens": 0, "length_cut": 0, "stopped": 0}  # of the rows
        self.damaged = 0  # lines of the part that are not rows; they are answered again
        self._fresh = fresh

    def __enter__(self) -> AnswerFile:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        taken = f"{self.out} is in use by another process; wait for it or name another --out"
        self._lock = hold(Path(f"{self.out}.lock"), taken)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:  # what could not be written before
            if error is None:
                raise
        finally:
            self._lock.release()

    def _open(self) -> None:
        before = _read_meta(self.meta)
        if self._fresh and before is not None:  # never a file that is not ours
            before = None
            for file in (self.out, self.part, self.meta, self.failures):
                file.unlink(missing_ok=True)
        there = [file for file in (self.out, self.part) if file.exists()]
        if there and before is None:
            raise ValueError(f"{there[0]} exists, but not the {self.meta.name} of a regeneration; name another --out")
        if before is not None and not any(file.stat().st_size for file in there):
            there = []  # no answer is kept that other settings could have made
        if there and before["settings"] != self.settings:
            raise ValueError(
                f"{there[0]} was made with other settings: {_changes(before['settings'], self.settings)}. "
                "Give the same, name another --out, or start anew with --fresh"
            )
        if not there:
            self._write_meta({})
        for file in there:
            for offset, content in _rows(file):
                row = _row(content)
                if row is None:
                    self.damaged += 1
                else:
                    self._add(row, file, offset)
        self._file = self.part.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """One finished row, which from here on survives the death of this process. ValueError: the disk is full."""
        offset = self._file.tell()
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.part} cannot be written: {error.strerror}; the {len(self.rows):,} conversations in it are kept, "
                "and the same command goes on from there"
            ) from error
        self._add(row, self.part, offset)

    def _add(self, row: dict[str, Any], file: Path, offset: int) -> None:
        index = _index(row)
        if index not in self.rows:
            self.tally["conversations"] += 1
            self.tally["completion_tokens"] += row["completion_tokens"]
            self.tally["length_cut"] += row["length_cut"]
            self.tally["stopped"] += "stopped" in row
        self.rows[index] = file, offset

    def write_failures(self, failures: dict[str, dict[str, Any]]) -> int:
        """Lists these, by id, with those of earlier runs that were not tried again; how many that is."""
        if self.failures.exists():
            earlier = (json.loads(line) for line in self.failures.read_bytes().splitlines())
            failures = {failure["id"]: failure for failure in earlier} | failures
        failures = {id: failure for id, failure in failures.items() if _index(failure) not in self.rows}
        if failures:
            write_file(self.failures, (_line(failure) for failure in sorted(failures.values(), key=_index)))
        else:
            self.failures.unlink(missing_ok=True)
        return len(failures)

    def finish(self, result: dict[str, Any]) -> None:
        """OUT in the order of the input, whole or not at all; the part is no longer needed then."""
        if not self.out.exists() or any(file == self.part for file, _ in self.rows.values()):
            write_file(self.out, self._in_order())
        self._write_meta({"result": self.tally | result})
        self.part.unlink()

    def _write_meta(self, more: dict[str, Any]) -> None:
        meta = {"settings": self.settings} | self._about | more
        write_file(self.meta, [(json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode("utf-8")])

    def _in_order(self) -> Iterator[bytes]:
        with ExitStack() as stack:
            opened = {file: stack.enter_context(file.open("rb")) for file in {file for file, _ in self.rows.values()}}
            for index in sorted(self.rows):
                file, offset = self.rows[index]
                opened[file].seek(offset)
                yield opened[file].readline()


def _read_meta(path: Path) -> dict[str, Any] | None:
    """The settings beside an output and what came of it; None when there are none. ValueError if damaged."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it") from error
    if meta is not None and not (isinstance(meta, dict) and isinstance(meta.get("settings"), dict)):
        raise ValueError(f"{path} holds no settings of a regeneration; name another --out")
    return meta


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, each with its first byte's place. What a kill left of a last one is cut off, so that the next begins a
    line of its own."""
    offset = 0
    with path.open("rb") as file:
        for content in file:
            if not content.endswith(b"\n"):
                break
            yield offset, content
            offset += len(content)
    if offset < path.stat().st_size:
        os.truncate(path, offset)


def _index(row: dict[str, Any]) -> int:
    return int(row["id"].rpartition("-")[2])


def _row(content: bytes) -> dict[str, Any] | None:
    """A row; None for a line that is none, as a full disk or a machine's crash can leave it."""
    try:
        row = json.loads(content)
        _index(row), row["completion_tokens"] + row["length_cut"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {json.dumps(before.get(name))} then, {json.dumps(now.get(name))} now" for name in names)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
