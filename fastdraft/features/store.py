"""The feature store: g and f of documents on disk, written once by `capture`, read by every training run after that.

    STORE/meta.json                       whose features: target, tokenizer, layers, dtype (`Meta`)
    STORE/target.safetensors              the target's embedding, lm_head and final norm: training needs no more of it
    STORE/shard-00007-<xxh3>.safetensors  g [G, 3*Ht], f [F, Ht], and with fp8 g_scale [G, 3], f_scale [F, 1];
                                          its index: keys [D, 16] uint8, rows [D, 2] int64, checksums [D] int64

A document is known by a hash of its token ids and loss mask. Its rows lie together, documents end to end, nothing
between them, and only the rows that a loss can reach are kept (`needed`). A shard's name ends in the xxh3-128 of the file;
each document has the xxh3-64 of its rows too, which is checked whenever it is read. Reading is by mmap.

# N packed tokens, D documents, G kept rows of g, F kept rows of f, Ht target hidden, W width of a row
"""

from __future__ import annotations

import json
import math
import mmap
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdraft.batch import Batch, TargetHead
from fastdraft.features.meta import (
    DTYPES,
    Meta,
    read_meta,
    refuse_file,
    refuse_other,
    write_meta,
)
from fastdraft.files import GIB, file_checksum, free_disk, publish

SHARD_BYTES = 512 * 2**20  # features of a shard, but for its last pack
INDEX_BYTES = 40  # of a document
HEADER_BYTES = 1024  # of a shard, at most
INDEX = {"keys": (torch.uint8, 16), "rows": (torch.int64, 2), "checksums": (torch.int64, None)}  # dtype, width
STORED_AS = {
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


class BadShard(ValueError):
    """A shard that is damaged, incomplete, or of another store."""


# --- which rows, and their names -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeededRows:
    """The rows of a batch that a loss can reach, documents in order."""

    g_rows: tuple[int, ...]  # D rows of g of each document: its first ones
    f_rows: tuple[int, ...]  # D
    g_index: Tensor  # [G] int64 rows of the batch
    f_index: Tensor  # [F] int64


def needed(batch: Batch) -> NeededRows:
    """By docs/mathematics.md, f_u is read where x_{u+1} is trained on, u >= 1; g_s by every chain t >= s, and the last
    chain starts two tokens before the last trained one. Nothing else of g and f can change a loss, whatever T is."""
    lengths = np.array(batch.lengths, dtype=np.int64)
    place = np.arange(batch.num_tokens) - batch.doc_start.numpy()
    trained = (batch.loss_mask.numpy() & (place >= 2)).nonzero()[0]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    f_rows = np.bincount(owner[trained], minlength=len(lengths))
    last = np.zeros_like(lengths)
    np.maximum.at(last, owner[trained], place[trained])
    g_rows = (last - 1).clip(0)
    g_index = (place < g_rows[owner]).nonzero()[0]
    index = (torch.from_numpy(x) for x in (g_index, trained - 1))
    return NeededRows(tuple(g_rows.tolist()), tuple(f_rows.tolist()), *index)


def document_keys(batch: Batch) -> list[bytes]:
    """D names of 16 bytes: the hash of a document's token ids and loss mask."""
    ids = batch.input_ids.numpy().astype(np.int32)
    mask = batch.loss_mask.numpy()
    keys, start = [], 0
    for length in batch.lengths:
        digest = xxhash.xxh3_128(ids[start : start + length])
        digest.update(mask[start : start + length])
        keys.append(digest.digest())
        start += length
    return keys


def raw(x: Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return x.view(torch.uint8).reshape(-1).numpy()


def document_checksum(parts: Iterable[Tensor]) -> int:
    """xxh3-64 over a document's rows of every tensor of `row_kinds`, or over an index; as int64."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(raw(part))
    return int(np.uint64(digest.intdigest()).view(np.int64))


def row_kinds(meta: Meta) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and width of a shard's row tensors, in the order in which a document's checksum runs over them."""
    kinds = {name: (DTYPES[meta.dtype], layers * meta.hidden_size) for name, layers in meta.widths.items()}
    scales = {f"{name}_scale": (torch.float32, layers) for name, layers in meta.widths.items()}
    return kinds | scales if meta.dtype == "fp8" else kinds


# --- a shard -------------------------------------------------------------------------------------------------------------


def shard_number(path: Path) -> int:
    return int(path.name.split("-")[1])


def list_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*-*.safetensors"))


@dataclass(frozen=True)
class PackRows:
    """What is kept of a pack: a piece of a shard."""

    keys: list[bytes]  # D
    rows: list[tuple[int, int]]  # D pairs of g rows, f rows
    tensors: dict[str, Tensor]  # `row_kinds`: rows of all documents end to end, on the CPU
    probes: dict[str, Tensor]  # g [G, k], f [F, k]: not finite where the row is not

    def parts(self, tensors: dict[str, Tensor]) -> Iterator[list[Tensor]]:  # D
        """Each document's rows of every tensor."""
        g, f = 0, 0
        for g_rows, f_rows in self.rows:
            at = {"g": slice(g, g + g_rows), "f": slice(f, f + f_rows)}
            yield [x[at[name[0]]] for name, x in tensors.items()]
            g, f = g + g_rows, f + f_rows


def write_shard(folder: Path, number: int, meta: Meta, packs: list[PackRows]) -> Path:
    """Writes aside, syncs, renames. Raises ValueError naming the document whose features are not finite.

    In safetensors' format, but not by its writer, which wants whole tensors and leaves the file to be read again for its
    checksum: concatenating and reading 512 MiB took 0.34 s on one core, writing and syncing them 0.3 s.
    """
    keys = [key for pack in packs for key in pack.keys]
    checksums = [document_checksum(parts) for pack in packs for parts in pack.parts(pack.tensors)]
    finite = [all(bool(x.isfinite().all()) for x in parts) for pack in packs for parts in pack.parts(pack.probes)]
    if not all(finite):
        d = finite.index(False)
        raise ValueError(
            f"the target's states of document {keys[d].hex()} (shard {number}, document {d}) are not finite; no draft can "
            "be trained on them: run the target in bf16 or fp32, or look at the document"
        )
    index = {
        "rows": torch.tensor([rows for pack in packs for rows in pack.rows], dtype=torch.int64),
        "checksums": torch.tensor(checksums, dtype=torch.int64),
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16).copy()),
    }
    mark = f"{meta.identity} {document_checksum(index[name] for name in INDEX):x}"
    pieces = {name: [index[name]] for name in ("rows", "checksums")}  # widest numbers first keeps all of them aligned
    pieces |= {name: [pack.tensors[name] for pack in packs] for name in reversed(row_kinds(meta))}
    pieces["keys"] = [index["keys"]]
    header, end = {"__metadata__": {"fastdraft": mark}}, 0
    for name, parts in pieces.items():
        begin, end = end, end + sum(part.numel() * part.element_size() for part in parts)
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        header[name] = {"dtype": STORED_AS[parts[0].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside, digest = folder / f".writing-{number:05d}", xxhash.xxh3_128()
    with aside.open("wb", buffering=0) as file:
        for chunk in (len(text).to_bytes(8, "little"), text, *(raw(part) for parts in pieces.values() for part in parts)):
            digest.update(chunk)
            view = memoryview(chunk)
            while len(view):
                view = view[file.write(view) :]
    final = folder / f"shard-{number:05d}-{digest.hexdigest()}.safetensors"
    publish(aside, final)
    return final


class Shard:
    """One shard, mapped into memory. Raises BadShard where header or index cannot be what `write_shard` wrote."""

    def __init__(self, path: Path, meta: Meta):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._base = np.frombuffer(self._map, np.uint8).ctypes.data
            header_bytes = int.from_bytes(self._map[:8], "little")
            self._header = json.loads(self._map[8 : 8 + header_bytes])
            self._data = 8 + header_bytes
            identity, _, index_checksum = self._header["__metadata__"]["fastdraft"].partition(" ")
            if identity != meta.identity:
                raise ValueError("it belongs to another store")
            index = [self._tensor(name, *kind) for name, kind in INDEX.items()]
            if f"{document_checksum(index):x}" != index_checksum:
                raise ValueError("its index has another checksum")
            self.keys = [bytes(key) for key in index[0].numpy()]
            self.rows, self.checksums = index[1].numpy(), index[2].numpy()
            ends = self.rows.cumsum(0)
            self.starts = ends - self.rows
            self.tensors = {}
            for name, kind in row_kinds(meta).items():
                count = int(ends[-1, "gf".index(name[0])]) if len(ends) else 0
                self.tensors[name] = self._tensor(name, *kind)
                if len(self.tensors[name]) != count:
                    raise ValueError(f"{name} has {len(self.tensors[name])} rows, its index says {count}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise BadShard(f"{path} is damaged: {error}") from error

    def _tensor(self, name: str, dtype: torch.dtype, width: int | None) -> Tensor:  # [n, width], or [n]
        said = self._header[name]
        shape, (begin, end) = said["shape"], said["data_offsets"]
        if STORED_AS[dtype] != said["dtype"] or shape[1:] != [width] * (width is not None):
            raise ValueError(f"{name} is {said['dtype']} {shape}")
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize or not 0 <= begin <= end <= len(self._map) - self._data:
            raise ValueError(f"{name} lies outside the file")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # nobody writes to it
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._data + begin).view(shape)

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self, d: int) -> list[Tensor]:
        """Rows of document d of every tensor, as views of the file."""
        (g_start, f_start), (g_rows, f_rows) = self.starts[d].tolist(), self.rows[d].tolist()
        at = {"g": slice(g_start, g_start + g_rows), "f": slice(f_start, f_start + f_rows)}
        return [x[at[name[0]]] for name, x in self.tensors.items()]

    def read_ahead(self, d: int) -> None:
        """Asks the system to start reading document d from the disk."""
        for part in self.parts(d):
            if part.numel():
                begin = part.data_ptr() - self._base
                page = begin - begin % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, page, begin + part.numel() * part.element_size() - page)


# --- a store -------------------------------------------------------------------------------------------------------------


class Store:
    """An open store. Shards that cannot be opened are in `damaged`, with the reason; the others' documents in `place`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.shards: list[Shard] = []
        self.damaged: dict[str, str] = {}
        self.place: dict[bytes, tuple[Shard, int]] = {}  # key -> shard, document in it
        self._seen: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that were written since."""
        for path in list_shards(self.folder):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                shard = Shard(path, self.meta)
            except BadShard as error:
                self.damaged[path.name] = str(error)
                continue
            self.shards.append(shard)
            for d, key in enumerate(shard.keys):
                self.place.setdefault(key, (shard, d))

    @property
    def is_complete(self) -> bool:
        return self.meta.shards is None or len({shard_number(Path(name)) for name in self._seen}) >= self.meta.shards

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def ends(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, TargetHead, Tensor | None]:  # embedding [V, Ht], head, final norm [Ht]
        """What training needs of the target, in `dtype` or as it was stored. Raises ValueError when target.safetensors is
        damaged."""
        path = self.folder / "target.safetensors"
        try:
            if file_checksum(path) != self.meta.ends:
                raise ValueError("its checksum is not meta.json's")
            found = {name: tensor.to(dtype) for name, tensor in load_file(path, str(device)).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}; run the same capture again into another folder") from error
        head = TargetHead(
            found.get("head.weight", found["embedding"]),
            found.get("head.bias"),
            self.meta.head_scale,
            self.meta.head_softcap,
        )
        return found["embedding"], head, found.get("final_norm")


@dataclass(frozen=True)
class Census:
    """What the shards hold that can be opened."""

    shards: int
    documents: int
    g_rows: int
    f_rows: int
    num_bytes: int


def census(store: Store) -> Census:
    rows = sum((shard.rows.sum(0) for shard in store.shards), np.zeros(2, np.int64))
    num_bytes = sum(shard.path.stat().st_size for shard in store.shards)
    return Census(len(store.shards), sum(map(len, store.shards)), int(rows[0]), int(rows[1]), num_bytes)


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


def verify_store(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file of a store with what is wrong with it, or None. Reads all of it. Raises ValueError without a meta.json."""
    store = Store(folder)
    try:
        store.ends()
        yield "target.safetensors", None
    except ValueError as error:
        yield "target.safetensors", str(error)
    by_name = {shard.path.name: shard for shard in store.shards}
    for path in list_shards(folder):
        wrong = store.damaged.get(path.name)
        if wrong is None and file_checksum(path) != path.stem.split("-")[2]:
            shard = by_name[path.name]
            bad = [d for d in range(len(shard)) if document_checksum(shard.parts(d)) != shard.checksums[d]]
            wrong = f"{path} is damaged: " + (
                f"{len(bad)} of its {len(shard)} documents ({', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''})"
                if bad
                else "its header or index"
            )
        yield path.name, wrong
    if not store.is_complete:
        here = {shard_number(path) for path in list_shards(folder)}
        missing = [n for n in range(store.meta.shards) if n not in here]
        some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        yield "capture", f"{len(missing)} of {store.meta.shards} shards are not there yet ({some}); run the capture again"


def merge_stores(out: Path, inputs: list[Path], say: Callable[[str], None] = lambda line: None) -> Census:
    """Copies the shards of several stores into a new one.

    Parts of one capture become that capture's store, byte for byte; stores of other data are put one after another.
    Raises ValueError when they are of different targets, tokenizers or dtypes, damaged, `out` holds something, or the disk
    is too small.
    """
    if len(inputs) < 2:
        raise ValueError(f"merge needs two stores or more, {len(inputs)} given")
    refuse_file(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder")
    metas = [read_meta(folder) for folder in inputs]
    first = metas[0]
    same_capture = all(meta == first for meta in metas) and first.shards is not None
    for folder, meta in zip(inputs[1:], metas[1:], strict=True):
        kept = [field.name for field in fields(Meta) if field.name not in ("data", "shards")]
        refuse_other(folder, meta, first, kept, f"{inputs[0]} holds")
    free_disk(out, sum(path.stat().st_size for folder in inputs for path in list_shards(folder)), "the merged store")
    out.mkdir(parents=True, exist_ok=True)
    taken: dict[int, str] = {}
    total = 0
    for folder in inputs:
        for path in list_shards(folder):
            if file_checksum(path) != path.stem.split("-")[2]:
                raise ValueError(f"{path} is damaged; `fastdraft features verify {folder}` says more")
            number = shard_number(path) if same_capture else total
            if same_capture and number in taken:
                if taken[number] != path.name:
                    say(f"shard {number} is in two stores with different bytes; the first is kept")
                continue
            taken[number], total = path.name, total + 1
            aside = out / ".writing-merge"
            shutil.copyfile(path, aside)
            publish(aside, out / f"shard-{number:05d}-{path.stem.split('-')[2]}.safetensors")
    shutil.copyfile(inputs[0] / "target.safetensors", out / ".writing-merge")
    publish(out / ".writing-merge", out / "target.safetensors")
    write_meta(out, first if same_capture else replace(first, data=None, shards=None))
    return census(Store(out))
