"""Features that SpecForge's prepare_hidden_states wrote, put into a store; and its vocabulary map.

A dump `data_<i>.ckpt` (or `.ckpt.gz`) is one document, a torch.save of
    input_ids [N] int64, loss_mask [N] of 0 and 1: token i is trained on, as here
    aux_hidden_state [1, N, 3*Ht]: what layers 2, n/2, n-3 read, which is what 1, n/2-1, n-4 give, low | mid | high
    hidden_state [1, N, Ht]: what lm_head reads, after the final norm (its trainer applies lm_head to it as it is)
and `vocab_mapping.pt` one of d2t [Vd] int64 (target id - draft id) and t2d [V] bool. (Read from SpecForge's source of
August 2026, and tried on what its script of that month writes.) Padding on the right is not marked, and need not be: the
document is cut after its last trained token, since nothing behind that can change a loss (`store.needed`). Files are loaded
with weights_only: nothing in them runs.

# N tokens of a document, Ht target hidden, V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fastdraft.batch import Batch, Features
from fastdraft.data.samples import Sample, record_batch
from fastdraft.data.vocab import load_dump
from fastdraft.features.meta import DTYPES, Meta
from fastdraft.features.store import SHARD_BYTES, Store, document_keys, shard_number
from fastdraft.features.writer import ShardWriter
from fastdraft.files import publish
from fastdraft.target.hf import Target

DOCUMENTS = "documents.parquet"
WIDTHS = {"g": 3, "f": 1}  # layers side by side in a dump
TOLERANCE = 0.1  # median over tokens of |theirs - ours| / |ours|; engines in bf16 differ by about 0.01


def list_dumps(folder: Path) -> list[Path]:
    """Dumps in SpecForge's own order. Raises ValueError when there are none."""
    found = [p for p in folder.rglob("data_*") if re.fullmatch(r"data_\d+\.ckpt(\.gz)?", p.name)]
    if not found:
        raise ValueError(f"{folder} holds no data_<number>.ckpt or .ckpt.gz; name the output folder of SpecForge's script")
    return sorted(found, key=lambda p: (int(p.name.split(".")[0].removeprefix("data_")), p))


def read_dump(path: Path, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Batch, Features] | None:
    """A document up to its last trained token, features in `dtype`; None when nothing in it can be trained on.

    Raises ValueError naming the file and the fault; also when its numbers do not fit `dtype` exactly.
    """
    ids, mask, g, f = load_dump(path, "input_ids", "loss_mask", "aux_hidden_state", "hidden_state")
    states = {"g": g, "f": f}
    n = ids.numel()
    if ids.shape != (n,) or mask.shape != (n,) or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"{path}: input_ids {tuple(ids.shape)} and loss_mask {tuple(mask.shape)} must be one row of equal "
            "length, loss_mask of 0 and 1"
        )
    if ids.is_floating_point() or (n and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size):
        raise ValueError(f"{path}: input_ids must be whole numbers from 0 to {vocab_size - 1}, this target's tokens")
    for name, x in states.items():
        wanted = (1, n, WIDTHS[name] * hidden_size)
        if tuple(x.shape) != wanted:
            raise ValueError(f"{path}: the states are {tuple(x.shape)}; {n} tokens of this target have {wanted}")
        if torch.promote_types(x.dtype, dtype) != dtype:
            raise ValueError(f"{path}: the states are {x.dtype}, target.dtype is {dtype}; set target.dtype=fp32")
    trained = mask.bool()
    trained[:2] = False
    if not bool(trained.any()):
        return None
    end = int(trained.nonzero()[-1]) + 1
    features = Features(*(x[0, :end].to(dtype) for x in states.values()))
    if not bool(features.g.isfinite().all() and features.f.isfinite().all()):
        raise ValueError(f"{path}: the states are not all finite; leave the file out")
    return Batch(ids[:end].to(torch.int64), mask[:end].bool(), (end,)), features


def refuse_other_states(path: Path, theirs: Features, target: Target, batch: Batch) -> None:
    """Runs the target over a dumped document. Raises ValueError naming what is not what the target gives there."""
    ours = target.capture(batch.to(target.device))
    ours = Features(ours.g.cpu(), ours.f.cpu())
    pairs = [*zip(theirs.g.chunk(3, -1), ours.g.chunk(3, -1), strict=True), (theirs.f, ours.f)]
    names = [f"layer {layer}" for layer in target.layers] + ["hidden_state (after the final norm)"]
    wrong = []
    for name, (a, b) in zip(names, pairs, strict=True):
        a, b = a.float(), b.float()
        error = float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-9)).median())
        if not error <= TOLERANCE:
            wrong.append(f"{name} by {error:.2f}")
    if wrong:
        raise ValueError(
            f"{path} is not of this target, or of other layers: its states are off from the target's own: "
            f"{'; '.join(wrong)} (relative, at most {TOLERANCE}); check target.path and draft.overrides.layers"
        )


def import_dumps(
    dumps: list[Path],
    target: Target,
    out: Path,
    meta: Meta,  # of the started store
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Puts the dumps' documents into a started store, and their tokens into documents.parquet, to train on. Killed, it
    goes on. Raises ValueError as `read_dump` and `refuse_other_states` do."""
    store, dtype = Store(out), DTYPES[meta.target_dtype]
    number = max((shard_number(shard.path) for shard in store.shards), default=-1) + 1
    taken, longest, unused, twice = set(store.place), 0, 0, 0
    proven = False
    aside = out / f".writing-{DOCUMENTS}"
    columns = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
    seen: set[bytes] = set()
    samples: list[Sample] = []
    with pq.ParquetWriter(aside, columns) as tokens, ShardWriter(out, meta) as writer:
        for path in dumps:
            document = read_dump(path, meta.hidden_size, target.vocab_size, dtype)
            if document is None:
                unused += 1
                continue
            batch, features = document
            if not proven:
                refuse_other_states(path, features, target, batch)
                proven = True
            (key,) = document_keys(batch)
            if key in seen:
                twice += 1
                continue
            seen.add(key)
            longest = max(longest, batch.num_tokens)
            samples.append(Sample(batch.input_ids.numpy(), batch.loss_mask.numpy()))
            if len(samples) == 1000:
                tokens.write_batch(record_batch(samples).select(columns.names))
                samples.clear()
            if key in taken:
                continue
            writer.add(batch, features, [0])
            if writer.open_bytes >= SHARD_BYTES:
                writer.finish(number)
                number += 1
        tokens.write_batch(record_batch(samples).select(columns.names))
        if writer.open_bytes:
            writer.finish(number)
    if not seen:
        raise ValueError(f"none of the {len(dumps)} dumps has a trained token")
    publish(aside, out / DOCUMENTS)
    say(
        f"{len(seen):,} documents; {unused} dumps without a trained token and {twice} repeated ones left out. Train with "
        f"data.paths=[{out / DOCUMENTS}], data.max_length of at least {longest}, features.path={out}"
    )


def import_bytes(dumps: list[Path], meta: Meta) -> int:
    """At most what the store will take. Compressed dumps count as they are: an estimate for them."""
    return sum(path.stat().st_size for path in dumps) // (2 if meta.dtype == "fp8" else 1)
