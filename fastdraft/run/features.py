"""What fills a feature store: the `features` commands that run a target, and `data regenerate --capture`."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock
from rich.console import Console

from fastdraft.answers.capture import AnswerCapture
from fastdraft.answers.job import Sampling
from fastdraft.answers.regenerate import Outcome, regenerate
from fastdraft.answers.server import Servers
from fastdraft.config import Config, FeaturesConfig
from fastdraft.data.prepare import chat_tokenizer
from fastdraft.dist import mesh
from fastdraft.features.meta import Meta
from fastdraft.features.store import SHARD_BYTES, Store, census
from fastdraft.files import GIB, free_disk
from fastdraft.model.precision import DTYPES
from fastdraft.run.draft import draft_shape
from fastdraft.run.dtypes import name_dtypes
from fastdraft.run.inputs import choose_holders, load_data, open_served, open_target, run_meta
from fastdraft.run.plan import check_target
from fastdraft.target.capture import fill_store, missing_bytes, plan_capture, run_capture
from fastdraft.target.hf import load_tokenizer
from fastdraft.target.identity import begin_store, stop_ids
from fastdraft.target.source import InProcess, Source, ends_of
from fastdraft.target.specforge import import_bytes, import_dumps, list_dumps
from fastdraft.target.stored import lacking


def capture_features(
    config: Config,
    out: Path,
    dtype: Literal["auto", "fp8"] = "auto",  # auto: what the target runs in
    part: tuple[int, int] = (0, 1),  # (i, n): every n-th shard from i on
    plan_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills the store `out` with the features of a run's documents, going on where an earlier call was stopped.

    ValueError when the disk is too small, `out` is another capture's, a server of target.url cannot be used, or features
    are not finite.
    """
    config = config.model_copy(update={"features": FeaturesConfig()})  # what training will read is what is made here
    shape, served = draft_shape(config), bool(config.target.url)
    device = mesh.planned_device(config.device)
    config, told = name_dtypes(config, device, store=out, runs_target=not served, trains=False, plans=plan_only)
    for line in told:
        say(line)
    wanted = run_meta(config, shape.layers, dtype)
    if config.data.streaming:
        raise ValueError(
            "features capture needs the data whole; set data.streaming=false, or fill a cache: features.mode=cache"
        )
    data = load_data(config, shape.vocab_size)
    capture = plan_capture(data.train, data.eval, config.data.pack_tokens, config.data.seed, wanted, shard_bytes)
    ends_bytes = 2 * shape.vocab_size * wanted.hidden_size * DTYPES[wanted.target_dtype].itemsize  # at most
    needed_bytes = missing_bytes(capture, out, part) + ends_bytes
    for line in capture.lines(wanted):
        say(line)
    free = free_disk(out, needed_bytes, "the feature store")
    say(f"at most {needed_bytes / GIB:.3f} GiB to write, target.safetensors with it; {free / GIB:.3f} GiB free at {out}")
    if plan_only:
        return
    device = mesh.start_process(config.device)
    holders = None
    if served:
        source = open_served(config, shape.layers, device, widened=False)
    else:
        holders, told = choose_holders(config, device)
        source = InProcess(open_target(config, shape.layers, device, holders))
        source.notes = told + source.notes
    try:
        for line in source.notes:
            say(line)
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / ".start.lock"):
            meta = begin_store(out, wanted, source.ends, data=capture.data, shards=len(capture.shards))
        run_capture(source, capture, out, meta, part, say, holders)
    finally:
        source.close()
    (out / ".start.lock").unlink(missing_ok=True)
    found = census(Store(out))
    say(f"{out}: {found.documents:,} documents in {found.shards} of {meta.shards} shards, {found.num_bytes / GIB:.3f} GiB")


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
    config = config.model_copy(update={"features": FeaturesConfig()})
    if config.data.streaming:
        raise ValueError("--capture needs the data whole; set data.streaming=false")
    named = [os.path.abspath(os.path.expanduser(path)) for path in config.data.paths]
    if not any(fnmatch.fnmatch(os.path.abspath(out), path) for path in named):
        raise ValueError(
            f"data.paths is {', '.join(config.data.paths)}, and the answers go to {out}: name that file in "
            "data.paths, so that the run which reads the store trains on them"
        )
    shape = draft_shape(config)
    device = mesh.start_process(config.device)
    config, told = name_dtypes(config, device, store=store, runs_target=False, trains=False)
    for line in told:
        say(line)
    wanted = run_meta(config, shape.layers)
    urls = [url.rstrip("/").removesuffix("/v1") + "/v1" for url in config.target.url]
    target = config.target.path, config.target.trust_remote_code
    check_target(config)
    chat = chat_tokenizer(config.data, load_tokenizer(*target), shape.vocab_size, stop_ids(*target))
    source = open_served(config, shape.layers, device, widened=False)
    try:
        for line in source.notes:
            say(line)
        meta = begin_store(store, wanted, source.ends)
        with _alone(store):
            with AnswerCapture(source, Store(store), chat) as capture:
                servers = Servers(urls, sampling=sampling, capture=capture, **server)
                outcome = regenerate(prompts, out, servers, console, **job)
            say(f"{store}: {capture.stored:,} documents came with their answers")
            if capture.missed is not None:
                say(f"some answers came without their states; the last reason: {capture.missed}")
            if outcome.complete:
                _fill(config, shape.vocab_size, source, store, meta, say)
            else:
                say(f"{store} gets the other documents once {out} is written")
    finally:
        source.close()
    return outcome


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Holds what a run that fills a cache holds, too. ValueError where another does."""
    lock = filelock.FileLock(store / ".cache.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another process is filling {store}; wait for it, or name another store") from None
    try:
        yield
    finally:
        lock.release()


def _fill(config: Config, vocab_size: int, source: Source, folder: Path, meta: Meta, say: Callable[[str], None]) -> None:
    """Captures the documents of a run that its store lacks."""
    data, store = load_data(config, vocab_size), Store(folder)
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


def import_specforge(
    config: Config,
    folder: Path,
    out: Path,
    dtype: Literal["auto", "fp8"] = "auto",  # auto: target.dtype
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Makes a store of the dumps of SpecForge's prepare_hidden_states in `folder`, after running the target over the first
    of them to see that they are its. ValueError names the file and the fault, or the fields in which `out` is another's.

    A dump is of a target that ran in bf16, unless target.dtype says fp32; what this machine is fast at does not matter.
    """
    shape = draft_shape(config)
    if config.target.dtype == "auto":
        config = config.model_copy(update={"target": config.target.model_copy(update={"dtype": "bf16"})})
    wanted = run_meta(config, shape.layers, dtype)
    dumps = list_dumps(folder)
    free_disk(out, import_bytes(dumps, wanted), "the feature store")
    target = open_target(config, shape.layers, mesh.start_process(config.device))
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".start.lock"):  # one import at a time
        import_dumps(dumps, target, out, begin_store(out, wanted, ends_of(target)), say)
