"""`data regenerate --capture`: the target answers prompts, and the states of what it ran go into a feature store."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from fastdraft.answers.capture import AnswerCapture, refuse_masked_prompts
from fastdraft.answers.job import PromptFiles, Sampling
from fastdraft.answers.regenerate import Outcome, regenerate
from fastdraft.answers.server import Servers
from fastdraft.config import Config, FeaturesConfig
from fastdraft.data.conversations import expand
from fastdraft.data.prepare import chat_tokenizer
from fastdraft.dist import mesh
from fastdraft.features.meta import Meta, refuse_file
from fastdraft.features.store import Store, census, list_shards
from fastdraft.files import GIB, hold
from fastdraft.model.methods import method_of
from fastdraft.run.draft import draft_shape
from fastdraft.run.dtypes import name_dtypes
from fastdraft.run.inputs import load_data, open_served, run_meta
from fastdraft.run.plan import check_target
from fastdraft.target.capture import fill_store, plan_capture
from fastdraft.target.hf import load_tokenizer
from fastdraft.target.identity import begin_store, stop_ids
from fastdraft.target.source import Source
from fastdraft.target.stored import lacking


def capture_answers(
    config: Config,  # whose target.url are the servers, and whose data.paths name `out`
    prompts: list[str],  # files or glob patterns
    out: Path,
    store: Path,
    sampling: Sampling,
    console: Console,
    say: Callable[[str], None],
    server: Mapping[str, Any],  # further arguments of `Servers`
    job: Mapping[str, Any],  # further arguments of `regenerate`
) -> Outcome:
    """Lets the servers answer prompts into `out`, and keeps the states of what they ran in `store`. Once all is answered,
    `store` is filled with the other documents of the run. Goes on where an earlier call was stopped.

    ValueError as for `regenerate` and `capture_features`.
    """
    _refuse(config, out, store, bool(job.get("fresh")))
    config = config.model_copy(update={"features": FeaturesConfig()})
    shape = draft_shape(config)
    device = mesh.start_process(config.device)
    config, told = name_dtypes(config, device, store=store, runs_target=False, trains=False)
    for line in told:
        say(line)
    wanted = run_meta(config, shape.layers)
    urls = [url.rstrip("/").removesuffix("/v1") + "/v1" for url in config.target.url]
    check_target(config)
    chat = chat_tokenizer(
        config.data, load_tokenizer(*config.target.files), shape.vocab_size, stop_ids(*config.target.files)
    )
    if (mask_token := method_of(shape).mask_token(shape)) is not None:
        refuse_masked_prompts(PromptFiles(expand(prompts)).dialogues(), chat, mask_token)
    source = open_served(config, shape.layers, device, widened=False)
    try:
        for line in source.notes:
            say(line)
        source.prove_answers(sampling.chosen())
        meta = begin_store(store, wanted, source.ends)
        # A run that fills the store as its cache holds this, too.
        lock = hold(store / ".cache.lock", f"another process is filling {store}; wait for it, or name another store")
        try:
            with AnswerCapture(source, Store(store), chat, mask_token) as capture:
                servers = Servers(urls, sampling=sampling, capture=capture, **server)
                outcome = regenerate(prompts, out, servers, console, **job)
            say(f"{store}: {capture.stored:,} documents came with their answers")
            if capture.missed is not None:
                say(f"some answers came without their states; the last reason: {capture.missed}")
            if outcome.complete:
                _fill(config, shape, source, store, meta, say)
            else:
                say(f"{store} gets the other documents once {out} is written")
        finally:
            lock.release()
    finally:
        source.close()
    return outcome


def _refuse(config: Config, out: Path, store: Path, fresh: bool) -> None:
    """ValueError where the run that is to read the store would not train on what goes into it."""
    refuse_file(store)
    if config.data.streaming:
        raise ValueError("--capture needs the data whole; set data.streaming=false")
    if not any(_finds(path, out) for path in config.data.paths):
        raise ValueError(
            f"data.paths is {', '.join(config.data.paths)}, and the answers go to {out}: name that file in "
            "data.paths, so that the run which reads the store trains on them"
        )
    if fresh and list_shards(store):
        raise ValueError(
            f"--capture {store} holds the features of documents already, and --fresh begins the answers anew: the old ones "
            "would stay beside the new. Name another store, or delete this one; to go on where an earlier call was stopped "
            "leave --fresh out"
        )


def _finds(pattern: str, file: Path) -> bool:
    """Whether an entry of data.paths will name a file once that is there, as `data.conversations.expand` reads entries."""

    def fits(wanted: list[str], parts: list[str]) -> bool:
        if wanted[:1] == ["**"]:
            return fits(wanted[1:], parts) or (bool(parts) and not parts[0].startswith(".") and fits(wanted, parts[1:]))
        if not wanted or not parts:
            return wanted == parts
        hidden = parts[0].startswith(".") and not wanted[0].startswith(".")
        return fnmatch.fnmatchcase(parts[0], wanted[0]) and not hidden and fits(wanted[1:], parts[1:])

    pattern, path = os.path.abspath(os.path.expanduser(pattern)), os.path.abspath(file)
    if pattern == path or os.path.exists(pattern):
        return pattern == path
    return fits(pattern.split(os.sep), path.split(os.sep))


def _fill(config: Config, shape: BaseModel, source: Source, folder: Path, meta: Meta, say: Callable[[str], None]) -> None:
    """Captures the documents of a run that its store lacks."""
    data, store = load_data(config, shape), Store(folder)
    (train, _), (held_out, _) = (lacking(store, dataset) for dataset in (data.train, data.eval))
    if train or held_out:
        say(f"{len(train) + len(held_out):,} documents are run again: not all that training reads of them was answered so")
        if not train:
            data = data._replace(train=data.eval, eval=data.eval.select([]))
            train, held_out = held_out, []
        parts = data.train.select(train), data.eval.select(held_out)
        fill_store(source, plan_capture(*parts, config.data.pack_tokens, config.data.seed, meta), folder, meta, say)
    found = census(Store(folder))
    say(f"{folder}: {found.documents:,} documents in {found.shards} shards, {found.num_bytes / GIB:.3f} GiB")
