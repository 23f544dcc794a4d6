"""`fastdraft data regenerate`: the target answers prompts itself. A draft learns best from what its target would say.

`answer_job.py` reads prompts and shows progress, `dialogue.py` goes through a conversation's turns, `answer_server.py` or
`answer_local.py` answers, `answer_file.py` keeps what is finished.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import fastdraft
from fastdraft.data.answer_file import AnswerFile
from fastdraft.data.answer_job import Job, Source, Stopped
from fastdraft.data.answer_server import Servers, check_extra_body
from fastdraft.data.conversations import expand

if TYPE_CHECKING:
    import torch

    from fastdraft.data.answer_local import LocalTarget

FORMAT = 1  # raised when the same prompts and settings make other rows than before


@dataclass(frozen=True)
class Sampling:
    """None is the model's own default: its generation_config.json, as a server or transformers reads it."""

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 2048  # for each answer
    seed: int | None = None
    extra_body: dict[str, Any] | None = None  # further keys of a request; for a local target chat_template_kwargs alone


@dataclass(frozen=True)
class Outcome:
    complete: bool  # OUT is written
    failures: int
    stopped_by: int | None = None  # signal


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
    check_extra_body(extra)
    return extra


def open_servers(urls: list[str], model: str | None, sampling: Sampling, **options: Any) -> Servers:
    """Servers that answer with these settings; options are those of `Servers`."""
    body = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
    }
    body = {name: value for name, value in body.items() if value is not None} | (sampling.extra_body or {})
    return Servers(urls, model, body, sampling.seed, **options)


def open_local(
    path: str, device: torch.device, dtype: str, batch_size: int, trust_remote_code: bool, sampling: Sampling
) -> LocalTarget:
    """A target loaded here, in dtype bf16 or fp32, that answers with these settings."""
    import torch  # here and not above: servers need neither it nor transformers, seconds to import

    from fastdraft.data.answer_local import LocalTarget
    from fastdraft.target.hf import load_target, load_tokenizer

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(dtypes)}")
    extra = sampling.extra_body or {}
    if unknown := extra.keys() - {"chat_template_kwargs"}:
        raise ValueError(f"--extra-body: {', '.join(sorted(unknown))} is for servers; --target knows chat_template_kwargs")
    return LocalTarget(
        load_target(path, dtypes[dtype], device, trust_remote_code=trust_remote_code),
        load_tokenizer(path, trust_remote_code),
        sampling.max_new_tokens,
        batch_size,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.seed or 0,
        extra.get("chat_template_kwargs"),
    )


def regenerate(
    paths: list[str],  # files or glob patterns
    out: Path,
    by: Servers | LocalTarget,
    sampling: Sampling,
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
    source = Source(expand(paths))
    if out.exists() and any(out.samefile(file) for file in source.files):
        raise ValueError(f"--out {out} is one of the files of prompts; name another")
    source.survey(skip_bad_lines)
    if source.bad_lines:
        say(f"{len(source.bad_lines):,} lines cannot be used and are left out, the first: {source.bad_lines[0]}")
    settings = {"format": FORMAT, "source": source.hashes} | _settings(by, sampling)
    about = {"fastdraft": fastdraft.__version__, "paths": source.files}
    if isinstance(by, Servers):
        about["servers"] = by.urls
    else:
        about["target"] = by.target.model.name_or_path
    with AnswerFile(out, settings, about, fresh) as file:
        if isinstance(by, Servers):
            say(f"{by.model}, {len(by.urls)} servers, {by.concurrency} requests at a time for each")
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


def _settings(by: Servers | LocalTarget, sampling: Sampling) -> dict[str, Any]:
    """What decides the answers. Another value of any of it and rows must not be mixed."""
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    settings |= {"max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed, "extra_body": sampling.extra_body}
    if isinstance(by, Servers):
        return {"backend": "server", "model": by.model} | settings
    from fastdraft.target.hf import target_fingerprint

    generation = by.target.model.generation_config
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    return {
        "backend": "transformers",
        "model": target_fingerprint(by.target),
        "dtype": str(by.target.dtype).removeprefix("torch."),
        "batch_size": by.batch_size,
        "generation_config": {name: getattr(generation, name, None) for name in names},
    } | settings
