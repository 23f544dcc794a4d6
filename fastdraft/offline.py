"""The `features` commands: each puts a run's pieces together for the functions of `fastdraft.features`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import filelock

from fastdraft.config import Config
from fastdraft.dist import mesh
from fastdraft.features.meta import DTYPES, start_store
from fastdraft.features.store import SHARD_BYTES, Store, census
from fastdraft.files import GIB, free_disk
from fastdraft.run import choose_holders, draft_shape, load_data, name_dtypes, open_target, run_meta
from fastdraft.target.capture import missing_bytes, plan_capture, run_capture
from fastdraft.target.identity import capture_meta, target_ends, target_fingerprint
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

    ValueError when the disk is too small, `out` is another capture's, or features are not finite.
    """
    shape = draft_shape(config)
    config, told = name_dtypes(config, mesh.planned_device(config.device), store=out, trains=False)
    for line in told:
        say(line)
    wanted = run_meta(config, shape.layers)
    wanted = replace(wanted, dtype="fp8" if dtype == "fp8" else wanted.dtype)
    if config.data.streaming:
        raise ValueError(
            "features capture needs the data whole; set data.streaming=false, or fill a cache: features.mode=cache"
        )
    data = load_data(config, shape.vocab_size)
    plan = plan_capture(data.train, data.eval, config.data.pack_tokens, config.data.seed, wanted, shard_bytes)
    ends_bytes = 2 * shape.vocab_size * wanted.hidden_size * DTYPES[wanted.target_dtype].itemsize  # at most
    needed_bytes = missing_bytes(plan, out, part) + ends_bytes
    for line in plan.lines(wanted):
        say(line)
    free = free_disk(out, needed_bytes, "the feature store")
    say(f"at most {needed_bytes / GIB:.3f} GiB to write, target.safetensors with it; {free / GIB:.3f} GiB free at {out}")
    if plan_only:
        return
    device = mesh.start_process(config.device)
    holders, told = choose_holders(config, device)
    for line in told:
        say(line)
    target = open_target(config, shape.layers, device, holders)
    wanted = capture_meta(wanted, target, target_fingerprint(target), data=plan.data, shards=len(plan.shards))
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".start.lock"):
        meta = start_store(out, wanted, target_ends(target))
    run_capture(target, plan, out, meta, part, say)
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
    shape = draft_shape(config)
    if config.target.dtype == "auto":
        config = config.model_copy(update={"target": config.target.model_copy(update={"dtype": "bf16"})})
    wanted = run_meta(config, shape.layers)
    wanted = replace(wanted, dtype="fp8" if dtype == "fp8" else wanted.dtype)
    dumps = list_dumps(folder)
    free_disk(out, import_bytes(dumps, wanted), "the feature store")
    device = mesh.start_process(config.device)
    target = open_target(config, shape.layers, device)
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".start.lock"):  # one import at a time
        meta = start_store(out, capture_meta(wanted, target, target_fingerprint(target)), target_ends(target))
        import_dumps(dumps, target, out, meta, say)


def inspect_lines(folder: Path) -> list[str]:
    """What a store holds. Raises ValueError when it is none."""
    store = Store(folder)
    meta, found = store.meta, census(store)
    of = "" if meta.shards is None else f" of {meta.shards}"
    return [
        f"target {meta.target} (layers {', '.join(map(str, meta.layers))}, hidden size {meta.hidden_size}), "
        f"run in {meta.target_dtype}; tokenizer {meta.tokenizer}",
        f"{found.documents:,} documents in {found.shards}{of} shards: {found.g_rows:,} rows of g, {found.f_rows:,} of f, "
        f"{meta.dtype}, {found.num_bytes / GIB:.3f} GiB, {found.num_bytes / max(found.g_rows, 1):,.0f} bytes a row of g",
        *([] if store.is_complete else ["not complete: give the capture command again, or merge the other parts"]),
        *store.damaged.values(),
    ]
