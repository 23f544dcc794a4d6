"""`fastdraft data regenerate`: the target answers prompts itself. A draft learns best from what its target would say.

`job.py` reads prompts and shows progress, `dialogue.py` goes through a conversation's turns, `server.py` or `local.py`
answers, and `file.py` keeps what is finished.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import fastdraft
from fastdraft.answers.file import AnswerFile
from fastdraft.answers.job import Job, PromptFiles, Stopped
from fastdraft.answers.server import Servers
from fastdraft.data.conversations import expand

if TYPE_CHECKING:
    from fastdraft.answers.local import LocalTarget

FORMAT = 1  # raised when the same prompts and settings make other rows than before


@dataclass(frozen=True)
class Outcome:
    complete: bool  # OUT is written
    failures: int
    stopped_by: int | None = None  # signal


def regenerate(
    paths: list[str],  # files or glob patterns
    out: Path,
    by: Servers | LocalTarget,
    console: Console,
    allow_failures: bool = False,  # write OUT without what failed
    skip_bad_lines: bool = False,
    fresh: bool = False,
) -> Outcome:
    """Answers all prompts into `out`, or goes on where an earlier call was stopped.

    ValueError: a bad line (unless skipped); an `out` of other settings or in use; no server answers any more.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out} must end in .jsonl")
    source = PromptFiles(expand(paths))
    if out.exists() and any(out.samefile(file) for file in source.files):
        raise ValueError(f"--out {out} is one of the files of prompts; name another")
    source.survey(skip_bad_lines)
    if source.bad_lines:
        say(f"{len(source.bad_lines):,} lines cannot be used and are left out, the first: {source.bad_lines[0]}")
    settings = {"format": FORMAT, "source": source.hashes} | by.settings() | asdict(by.sampling)
    about = {"fastdraft": fastdraft.__version__, "paths": source.files, "by": by.about()}
    with AnswerFile(out, settings, about, fresh) as file:
        say(about["by"])
        if file.damaged:
            say(f"{file.part}: {file.damaged} damaged lines; they are answered again")
        if file.rows:
            say(f"{len(file.rows):,} of {source.num_conversations:,} conversations are answered already")
        job = Job(source, file, console, allow_failures)
        try:
            with job:
                by.answer(job)
        except Stopped as stopped:
            say(f"{job.status()}; stopped by {stopped}. The same command goes on from here")
            return Outcome(False, len(job.failures), stopped.number)
        finally:
            failed = file.write_failures(job.failures)
        say(job.status())
        if failed:
            say(f"{failed:,} conversations failed; {file.failures} says why, the same command tries them again")
            if not allow_failures:
                say(f"{out} is not written yet: --allow-failures writes it without them")
                return Outcome(False, failed)
        file.finish({"failed": failed, "bad_lines": len(source.bad_lines)})
        say(
            f"{out}: {file.tally['conversations']:,} conversations, {file.tally['completion_tokens']:,} tokens answered, "
            f"{file.tally['length_cut']:,} with an answer cut by its length, {file.tally['stopped']:,} ended early"
        )
        return Outcome(True, failed)
