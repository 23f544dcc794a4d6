"""Packed documents in one forward of a transformers model: none sees another, nothing is padded.

All of a decoder but its attention works token by token, so documents may lie one after the other in one row if their
positions start anew and attention keeps them apart. While `packed` is entered, the model's attention is `_attend`: on a GPU
the kernel that the draft trains with (`ttt_attention`, without diagonal terms), on a CPU one document after the other.

Models that do anything else with other tokens cannot run so; `unpackable` and `_attend` name what they see of that, and
`Target` compares a packed forward with one of each document.

Several processes may share the tokens (`shared`): each runs all layers on its own rows of the pack, and before it attends
it gathers the keys and values of all of them, which are small beside what a layer computes for a row. Its rows then see
what they see in one process: the tokens of their document up to themselves. A layer's sliding window only moves a row's
first key, so that such targets are shared, too, with all keys gathered. Which window a layer has it says itself when it
attends, and `Target` compares that with the config: some models keep it in a mask alone, which is not used here.

# n tokens of all documents, m rows of this process, c rows of a slice, S processes, Hq/Hkv heads, D head dim
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from fastdraft.batch import document_starts, to_device
from fastdraft.dist.mesh import Axis
from fastdraft.kernels.ttt_attention import ttt_attention
from fastdraft.model.graph import GraphPool, Replay

NAME = "fastdraft_packed"
WITH_SINKS = {"gpt_oss"}  # model types whose softmax has a term more for each head
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


@dataclass(frozen=True)
class Documents:
    lengths: tuple[int, ...]
    row: Tensor  # [m] int64, of a token in the pack; 0 .. n-1 where this process has them all
    start: Tensor  # [m] int64, row of the first token of its document
    axis: Axis | None = None  # the processes that share the tokens; None: this process has them all
    windows: list[int | None] | None = None  # what layers say of theirs as they attend; None: a window is refused

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device) -> Documents:
        return Documents(lengths, *_index(lengths, device))

    @staticmethod
    def shared(lengths: tuple[int, ...], axis: Axis, device: torch.device) -> Documents:
        """Rows `own_slices` of this process. The lengths fill 2 S slices."""
        own = own_slices(torch.arange(sum(lengths)), axis.rank, axis.size)
        return Documents(lengths, *to_device([own, document_starts(lengths)[own]], device).view(2, -1), axis, [])

    @property
    def position(self) -> Tensor:  # [m] int64, of each token in its document
        return self.row - self.start


def own_slices(
    x: Tensor,  # [n, ...], n a multiple of 2 S
    rank: int,
    size: int,  # S
) -> Tensor:  # [n / S, ...]
    """The rows of one process, slices rank and 2 S - 1 - rank: see `PackShare`."""
    slices = x.view(2 * size, -1, *x.shape[1:])
    return torch.cat([slices[rank], slices[2 * size - 1 - rank]])


def in_pack_order(
    gathered: Tensor,  # [S * m, ...], the rows `own_slices` of all processes
    size: int,  # S
) -> Tensor:  # [n, ...]
    slices = gathered.view(size, 2, -1, *gathered.shape[1:])
    return torch.cat([slices[:, 0].flatten(0, 1), slices[:, 1].flip(0).flatten(0, 1)])


def _index(lengths: tuple[int, ...], device: torch.device) -> Tensor:  # [2, n] int64, rows and starts of `Documents`
    start = document_starts(lengths)
    return to_device([torch.arange(len(start)), start], device).view(2, -1)


_documents: ContextVar[Documents] = ContextVar("documents")


@contextmanager
def packed(config: PretrainedConfig, documents: Documents) -> Iterator[None]:
    """Meanwhile, a forward of the decoder with this config takes input_ids [1, n] of these documents, and their
    position_ids. ValueError in it when a layer attends in a way that `_attend` does not know."""
    before, token = config._attn_implementation, _documents.set(documents)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _documents.reset(token)


def unpackable(
    config: PretrainedConfig,
    shared: bool = False,  # whether processes would share the tokens, which sliding windows do not keep them from
) -> str | None:
    """What in a decoder's config says that its documents must run apart, or may not be shared; None when nothing does."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if shared:
        sinks = " with sinks" if config.model_type in WITH_SINKS else ""
        kinds -= set() if sinks else {"sliding_attention"}
    else:
        sinks = ""
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}{sinks}"
    if not shared and not getattr(config, "layer_types", None) and any(windows_of(config)):
        return f"it attends within a window of {config.sliding_window} tokens"  # Phi-MoE has it in its mask alone
    ropes = [getattr(config, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    if other := sorted({rope.get("rope_type") for rope in ropes} & {"dynamic", "longrope"}):
        return f"its RoPE ({other[0]}) depends on the longest document"
    return None


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """How many tokens a row of each layer sees, itself included, as a decoder's config says. None: all."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds:
        return [cuts(config, window) if kind == "sliding_attention" else None for kind in kinds]
    return [cuts(config, window)] * config.num_hidden_layers


def cuts(config: PretrainedConfig, window: int | None) -> int | None:
    """The window, or None where the model has no positions beyond it."""
    longest = getattr(config, "max_position_embeddings", None)
    return window if window and not (longest and window >= longest) else None


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, Hq, m, D]
    key: Tensor,  # [1, Hkv, m, D]
    value: Tensor,  # [1, Hkv, m, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: object,
) -> tuple[Tensor, None]:  # [1, m, Hq, D]
    documents, window = _documents.get(), more.get("sliding_window")
    known = HARMLESS | ({"sliding_window"} if documents.windows is not None else set())
    unknown = sorted(name for name, value in more.items() if value is not None and name not in known)
    if attention_mask is not None or dropout:
        unknown.append("a mask" if attention_mask is not None else "dropout")
    if unknown or value.shape[-1] != query.shape[-1] or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} attends with {', '.join(unknown) or 'other shapes or no causal mask'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda or documents.axis is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if documents.axis is not None:
            k, v = _of_all(k, v, documents.axis)
        start = documents.start
        if documents.windows is not None:
            documents.windows.append(window)
            start = start if window is None else torch.maximum(start, documents.row - (window - 1))
        attend = ttt_attention if query.is_cuda else _attend_rows
        return attend(q, k, v, None, None, documents.row, start, scale)[None], None
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    parts = (x.split(documents.lengths, 2) for x in (query, key, value))
    for place, q, k, v in zip(out.split(documents.lengths, 1), *parts, strict=True):
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        place.copy_(part.transpose(1, 2))
    return out, None


def _of_all(
    k: Tensor,  # [m, Hkv, D]
    v: Tensor,  # [m, Hkv, D]
    axis: Axis,
) -> tuple[Tensor, Tensor]:  # [n, Hkv, D] each, in the order of the pack
    """The keys and values of all processes, in one message."""
    both = in_pack_order(axis.gather(torch.stack([k, v], 1)), axis.size)
    return both[:, 0], both[:, 1]


def _attend_rows(
    q: Tensor,  # [m, Hq, D]
    k: Tensor,  # [n, Hkv, D]
    v: Tensor,  # [n, Hkv, D]
    _k_diag: None,
    _v_diag: None,
    row: Tensor,  # [m]
    start: Tensor,  # [m]
    scale: float,
) -> Tensor:  # [m, Hq, D]
    """`ttt_attention` on a CPU: rows of one document and one slice together, over the keys from the first that one of them
    sees to the last, without scores that are kept. In a document a window moves `start` by at most 1 from row to row."""
    out = torch.empty_like(q)
    breaks = ((row.diff() != 1) | (start.diff() > 1)).nonzero()[:, 0] + 1
    ends = [0, *breaks.tolist(), len(row)]
    for a, b in itertools.pairwise(ends):
        first, last = int(start[a]), int(row[b - 1]) + 1
        keys = torch.arange(first, last)
        sees = (keys <= row[a:b, None]) & (keys >= start[a:b, None])
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[first:last], v[first:last]))
        part = F.scaled_dot_product_attention(*heads, attn_mask=sees, scale=scale, enable_gqa=True)
        out[a:b] = part[0].transpose(0, 1)
    return out


AttentionInterface.register(NAME, _attend)


class Recorded:
    """A forward over n packed tokens as a CUDA graph, for targets so small that the host's launches take longer than the
    GPU's work. The first runs as it is, the second is recorded, later ones replay it."""

    def __init__(
        self,
        n: int,
        forward: Callable[[Tensor, Documents], tuple[Tensor, ...]],
        device: torch.device,
        pool: GraphPool,
    ):
        self.forward, self.replay = forward, Replay(pool, device)
        self.input_ids = torch.zeros(n, dtype=torch.int64, device=device)
        self.index = torch.zeros(2, n, dtype=torch.int64, device=device)
        self.out: tuple[Tensor, ...] = ()

    def __call__(
        self,
        input_ids: Tensor,  # [m] int64, m <= n
        lengths: tuple[int, ...],
    ) -> tuple[Tensor, ...]:  # copies of m rows
        m, n, device = len(input_ids), len(self.input_ids), self.input_ids.device
        lengths = lengths if m == n else (*lengths, n - m)  # a document more: nothing sees it
        self.input_ids[:m] = input_ids
        self.index.copy_(_index(lengths, device))
        documents = Documents(lengths, *self.index)
        self.replay.run(lambda: self._run_into_out(documents))
        return tuple(x[:m].clone() for x in self.out)

    def _run_into_out(self, documents: Documents) -> None:
        self.out = self.forward(self.input_ids, documents)
