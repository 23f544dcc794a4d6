"""How states pass from a serving engine to a trainer on the same host: files in a folder of shared memory.

Both ends run this file, the engine in its own Python, so it imports the standard library alone. A server's folder holds

    server.json          what the server says of itself; a client that can read it is on the server's host
    CLIENT.lock          locked by a trainer for as long as it lives
    CLIENT-NUMBER        the states of one prompt, raw rows, which the trainer reads and removes
    CLIENT-NUMBER.error  a sentence that says why there are none
    .CLIENT-NUMBER       a file that is still being written

CLIENT is 16 hex digits, drawn by each trainer. Whatever bears the name of a client that no longer lives is removed by the
next client or server that starts, and the server writes nothing for it any more. A lock ends with its process, however
that ends, so no process ids are compared, which mean nothing across containers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat

NAME = re.compile(r"\.?([0-9a-f]{16})(?:-\d{1,12}(?:\.error)?|\.lock)")


def client_of(name: str) -> str | None:
    """The client that a file belongs to; None for a name that no client has."""
    found = NAME.fullmatch(name)
    return found[1] if found else None


def is_request(name: object) -> bool:
    """Whether a server may write states under a name that a request brings."""
    return isinstance(name, str) and re.fullmatch(r"[0-9a-f]{16}-\d{1,12}", name) is not None


def open_folder(folder: str) -> None:
    """Makes a server's folder, for its user alone. ValueError when something else is in its place."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}); name another folder with --folder") from error
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(
            f"{folder} is not a folder of this user alone (mode 0700), so other users could read or replace states; remove "
            "it, or name another with --folder"
        )


def write_server(folder: str, about: dict) -> None:
    aside = f"{folder}/.server-{os.getpid()}"
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        json.dump(about, file)
    os.rename(aside, f"{folder}/server.json")


def read_server(folder: str) -> dict:
    """What `write_server` wrote, or nothing where this host has no such folder."""
    try:
        with open(f"{folder}/server.json") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def new_client(folder: str) -> tuple[str, int]:
    """A client's name, and the open file that keeps its lock. OSError when the folder cannot be written."""
    client = secrets.token_hex(8)
    # The lock is held before the file has its name, so that nobody takes this client for a dead one in between.
    aside = f"{folder}/.lock-{client}"
    lock = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(aside, f"{folder}/{client}.lock")
    return client, lock


def is_alive(folder: str, client: str) -> bool:
    """Whether a client still holds its lock."""
    try:
        lock = os.open(f"{folder}/{client}.lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def remove_client(folder: str, client: str) -> None:
    """Removes all that a client has in the folder, its lock last."""
    names = [name for name in os.listdir(folder) if client_of(name) == client]
    for name in sorted(names, key=lambda name: name.endswith(".lock")):
        _remove(f"{folder}/{name}")


def remove_dead(folder: str) -> int:
    """Removes what dead clients left behind, and says how many files of states that were."""
    clients = {client_of(name) for name in os.listdir(folder)} - {None}
    dead = {client for client in clients if not is_alive(folder, client)}
    left = [name for name in os.listdir(folder) if client_of(name) in dead and not name.endswith(".lock")]
    for client in dead:
        remove_client(folder, client)
    return len(left)


def hand_over(folder: str, name: str, rows: memoryview) -> None:
    """Gives a live client its rows; the file has its name only when it is whole. OSError when the memory is full."""
    if not is_alive(folder, client_of(name)):
        return
    aside = f"{folder}/.{name}"
    file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            while rows:
                rows = rows[os.write(file, rows) :]
        finally:
            os.close(file)
        os.rename(aside, f"{folder}/{name}")
    except BaseException:
        _remove(aside)
        raise


def hand_over_error(folder: str, name: str, sentence: str) -> None:
    """Tells the client why it gets no rows. It needs so little room that even a full memory has it."""
    if is_alive(folder, client_of(name)):
        aside = f"{folder}/.{name}.error"
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(sentence)
        os.rename(aside, f"{folder}/{name}.error")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
