"""Files that are there whole or not at all: written aside, synced, renamed. And how to tell that they still are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import filelock
import xxhash

GIB = 2**30


def write_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replaces a file, in a folder that is made if it is not there. OSError leaves what was there, and names the file where
    the disk was why. One writer at a time: a killed one's file aside is the next one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".writing-{path.name}")
    try:
        with aside.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        publish(aside, path)
    except OSError as error:
        # A full disk does not say which file. What a library raises without a number would lose its text by a name.
        if error.errno is not None and error.filename in (None, str(aside)):
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def publish(aside: Path, final: Path) -> None:
    """Gives a file that was written aside its name, once it is on the disk."""
    sync(aside)
    os.replace(aside, final)
    sync(final.parent)


def hold(path: Path, sentence: str) -> filelock.FileLock:
    """A lock that this process holds until it releases or forgets it, or ends. ValueError, with the sentence, where another
    process holds it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(sentence) from None
    return lock


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def file_checksum(path: Path) -> str:
    """xxh3-128 of a file, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def json_checksum(value: object) -> str:
    """xxh3-64 of a value as JSON, 16 hex digits; of its text where it is none."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def free_disk(path: Path | str, needed: int = 0, what: str = "a checkpoint") -> int:
    """Free bytes where `path` is or will be. Raises ValueError when `needed` bytes for `what` do not fit."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{what} needs {needed / GIB:.2f} GiB at {path}, which has {free / GIB:.2f} GiB free; "
            "free some space or choose another folder"
        )
    return free
