"""What a run reads: its documents, its target, and where the target's features come from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from datasets import Dataset
from pydantic import BaseModel

from fastdraft.config import Config, asks_servers
from fastdraft.data.prepare import Prepared, prepare
from fastdraft.data.samples import longest_sample, scan
from fastdraft.data.stream import open_stream
from fastdraft.dist import mesh
from fastdraft.dist.fleet import fits
from fastdraft.features.meta import COMPARED, Meta, refuse_other
from fastdraft.features.store import Store
from fastdraft.files import GIB
from fastdraft.model.methods import method_of
from fastdraft.model.precision import DTYPES, bf16_is_slow
from fastdraft.run.dtypes import target_dtype
from fastdraft.run.plan import check_target, choose_layout, layout_memory, refuse_too_long
from fastdraft.target.cached import StoreCache
from fastdraft.target.hf import Target, load_target, load_tokenizer
from fastdraft.target.identity import begin_store, expected_meta, stop_ids, target_fingerprint
from fastdraft.target.served.ends import load_ends
from fastdraft.target.served.feature_server import Wanted
from fastdraft.target.served.source import ServedSource
from fastdraft.target.source import InProcess, Source, ends_of
from fastdraft.target.stored import StoreReader, check_documents


def load_data(
    config: Config,
    shape: BaseModel,  # the draft's
) -> Prepared:
    """The tokenised train and held-out sets; the latter may be empty. One rank fills the cache while the others wait.

    With data.streaming, the stream and sets made of a sample of it. ValueError where the target has too few positions,
    where a document has the draft's mask token, and where no document of a set can train, or measure, the draft.
    """
    check_target(config)
    method = method_of(shape)
    given = load_tokenizer(*config.target.files), shape.vocab_size, stop_ids(*config.target.files)
    if config.data.streaming:
        data = open_stream(config.data, *given, mesh.machine_share(), method.mask_token(shape))
    else:
        data = prepare(config.data, *given, method.mask_token(shape))
        longest = max(map(longest_sample, (data.train, data.eval)))
        refuse_too_long(config, longest, f"a document has {longest} tokens")
    for name, documents in {"train": data.train, "held-out": data.eval}.items():
        if len(documents):
            method.refuse_useless(name, scan(documents))
    return data


def trained_and_held_out(config: Config, data: Prepared) -> list[str]:
    """A warning where conversations of data.eval_paths are trained on, too, since only what eval_fraction holds out is kept
    apart. Of a stream nothing is said, whose documents are not all known."""
    if not config.data.eval_paths or data.stream is not None or not len(data.eval):
        return []
    held_out = np.unique(_conversations(data.eval))
    both = np.isin(held_out, _conversations(data.train)).sum()
    if not both:
        return []
    return [
        f"warning: {both:,} of the {len(held_out):,} held-out conversations are trained on, too, so their "
        "numbers flatter the draft: take them out of data.paths, or leave out data.eval_paths"
    ]


def _conversations(dataset: Dataset) -> np.ndarray:  # [samples] uint64, the hash of what each is from
    tables = dataset.select_columns("conversation").with_format("arrow").iter(batch_size=100_000)
    return np.concatenate([table["conversation"].to_numpy() for table in tables])


def documents_hash(dataset: Dataset) -> str:
    """Of all tokens, masks and lengths, in order."""
    digest = xxhash.xxh3_128()
    for arrays in scan(dataset):
        for values in arrays:
            digest.update(values.tobytes())
    return digest.hexdigest()


def open_target(
    config: Config,
    layers: tuple[int, ...],
    device: torch.device,
    holders: mesh.Axis | None = None,  # `choose_holders`; None: it is whole here
    sequence: mesh.Axis | None = None,  # who share a pack's tokens; None: each process has packs of its own
    run_in: torch.dtype | None = None,  # to compute with its weights in; None: their own
) -> Target:
    path, trust_remote_code = config.target.files
    more = {"run_in": run_in, "holders": holders, "sequence": sequence}
    return load_target(path, target_dtype(config, device), device, layers, trust_remote_code, **more)


def choose_holders(config: Config, device: torch.device) -> tuple[mesh.Axis | None, list[str]]:
    """The processes that hold the target together with this one (None: it holds it alone), and what to tell the user.

    All processes call it, and rank 0 chooses.
    `auto` shards a target that does not fit on a GPU beside the draft's training, as far as `layout_memory` tells. A host's
    GPUs share it if they can hold it, because their links are fast; otherwise those of several hosts do.
    """
    if mesh.world() == 1 or config.dist.target == "replicated" or (config.dist.target == "auto" and device.type == "cpu"):
        return None, []
    size, told = mesh.from_rank_0(_choose_holders(config, device) if mesh.is_rank_0() else None)
    return mesh.holders(size) if size > 1 else None, told


def _choose_holders(config: Config, device: torch.device) -> tuple[int, list[str]]:
    on_gpu, auto, world = device.type == "cuda", config.dist.target == "auto", mesh.world()
    gpu_gib = torch.cuda.get_device_properties(device).total_memory / GIB if on_gpu else math.inf
    memory = layout_memory(config, device)
    layout = choose_layout(config, world, mesh.host_size(), device, lambda layout: fits(memory(layout), gpu_gib))
    if layout.holders == 1:
        return 1, []
    told = [f"the target is sharded: each of {layout.holders} processes holds 1/{layout.holders} of every layer"]
    gib = lambda layout: sum(row.size for row in memory(layout)) / GIB  # noqa: E731
    if auto:
        whole = gib(replace(layout, holders=1))
        told[0] += f"; whole it would need {whole:.0f} of the {gpu_gib:.0f} GiB of a GPU"
    if not fits(memory(layout), gpu_gib):
        told.append(f"by prediction it does not fit even so, with {gib(layout):.0f} GiB a GPU: see --plan --world {world}")
    return layout.holders, told


def open_source(
    config: Config,
    layers: tuple[int, ...],
    device: torch.device,
    sets: list[Dataset],
    halo: int = 0,  # rows behind its own that a process needs of a pack whose tokens it shares
) -> Source:
    """Where the features of a run come from. A store is checked against the run: ValueError names each field that differs.

    On a CPU where bf16 is slow a store's bf16 numbers are widened to fp32, which loses nothing.
    """
    if asks_servers(config):
        return open_served(config, layers, device)
    if config.features.path is None:
        holders, told = choose_holders(config, device)
        target = open_target(config, layers, device, holders, mesh.axis("sequence"))
        source = InProcess(target, halo)
        source.notes = told + source.notes
        return source
    folder = Path(config.features.path)
    wanted = run_meta(config, layers)
    if config.features.mode == "cache":
        holders, told = choose_holders(config, device)
        target = open_target(config, layers, device, holders)
        fingerprint = target_fingerprint(target) if target.holders.size > 1 else None  # they take it together
        if mesh.is_rank_0():
            begin_store(folder, wanted, ends_of(target, fingerprint))
        mesh.barrier()
        cache = StoreCache(target, Store(folder), int(config.features.max_gib * GIB), mesh.rank(), mesh.world())
        cache.notes = told + cache.notes
        mesh.barrier()  # nobody writes before all have counted
        return cache
    store = Store(folder)
    refuse_other(folder, store.meta, wanted, COMPARED)
    notes = check_documents(store, [x for x in sets if len(x)], config.features.on_bad_shard)
    dtype = torch.float32 if bf16_is_slow(device) else DTYPES[store.meta.target_dtype]
    reader = StoreReader(store, device, config.features.on_bad_shard, dtype)
    reader.notes += notes
    return reader


def open_served(config: Config, layers: tuple[int, ...], device: torch.device, widened: bool = True) -> ServedSource:
    """The servers of target.url, compared with the files of target.path and proven. ValueError where one cannot be used.

    Where bf16 is slow on this CPU, features are `widened` to fp32, in which training computes faster.
    """
    dtype = torch.float32 if widened and bf16_is_slow(device) else target_dtype(config, device)
    meta = run_meta(config, layers)
    ends = load_ends(config.target.path, dtype, device, config.target.trust_remote_code)
    wanted = Wanted(
        weights=meta.weights,
        config=meta.config,
        layers=layers,
        num_layers=ends.num_layers,
        hidden_size=ends.ends.hidden_size,
        dtype=config.target.dtype,
        max_length=config.data.max_length,
    )
    return ServedSource(config.target.url, ends, wanted, first=mesh.rank(), timeout_s=config.target.timeout_s)


def run_meta(config: Config, layers: tuple[int, ...], dtype: Literal["auto", "fp8"] = "auto") -> Meta:
    """What a store for this run says of the target, as far as files and a config of `name_dtypes` tell. `dtype` is that of
    its rows, auto what the target runs in."""
    assert config.target.dtype != "auto"
    meta = expected_meta(*config.target.files, layers, config.target.dtype)
    return replace(meta, dtype="fp8") if dtype == "fp8" else meta
