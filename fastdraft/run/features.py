"""The `features` commands that run a target: they fill a store from documents, or from SpecForge's dumps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import filelock

from fastdraft.config import Config, FeaturesConfig
from fastdraft.dist import mesh
from fastdraft.features.meta import refuse_file
from fastdraft.features.store import SHARD_BYTES, Store, census
from fastdraft.files import GIB, free_disk
from fastdraft.model.precision import DTYPES
from fastdraft.run.draft import draft_shape
from fastdraft.run.dtypes import name_dtypes
from fastdraft.run.inputs import choose_holders, load_data, open_served, open_target, run_meta
from fastdraft.target.capture import missing_bytes, plan_capture, run_capture
from fastdraft.target.identity import begin_store
from fastdraft.target.source import InProcess, ends_of
from fastdraft.target.specforge import import_bytes, import_dumps, list_dumps


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
    refuse_file(out)
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
    data = load_data(config, shape)
    capture = plan_capture(data.train, data.eval, config.data.pack_tokens, config.data.seed, wanted, shard_bytes)
    ends_bytes = 2 * shape.vocab_size * wanted.hidden_size * DTYPES[wanted.target_dtype].itemsize  # at most
    needed_bytes = missing_bytes(capture, out, part) + ends_bytes
    for line in capture.lines(wanted):
        say(line)
    free = free_disk(out, needed_bytes, "the feature store")
    say(f"at most {needed_bytes / GIB:.3f} GiB to write, target.safetensors with it; {free / GIB:.3f} GiB free at {out}")
    if plan_only:
        return
    device = mesh.start_process(config.device, config.dist.timeout_s)
    with mesh.ending_together(config.dist.silent_s):
        holders = None
        if served:
            source = open_served(config, shape.layers, device, widened=False)
            source.say = say
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
            capture_s = max(config.dist.disk_s, config.target.timeout_s) if served else config.dist.stuck_s
            run_capture(source, capture, out, meta, part, say, holders, capture_s, config.dist.disk_s)
        finally:
            source.close()
    (out / ".start.lock").unlink(missing_ok=True)
    found = census(Store(out))
    say(f"{out}: {found.documents:,} documents in {found.shards} of {meta.shards} shards, {found.num_bytes / GIB:.3f} GiB")


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
    refuse_file(out)
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
