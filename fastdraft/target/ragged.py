"""Sequences of different lengths in one forward of the target, each with its own keys and values: for decoding many prompts
at once.

A sequence's tokens lie in its row of a cache from the left, without gaps. A forward gets as many new tokens of every
sequence; they are written behind what the sequence keeps, and a mask of their own says whom they see. What they see is
then what they see alone, so the states are the same up to the order of sums.

That holds for models whose tokens meet in attention alone, take a mask as it is given and the positions as they are given.
`why_apart` says what in a config is against it, and compares a trial with the sequences run one at a time.

# B sequences, n new tokens of each, L tokens of the longest, W columns of the cache that are read, Hkv heads, D head dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from fastdraft.model.target_config import first_line
from fastdraft.target.hf import RUN_TOKENS, Target
from fastdraft.target.packed import unpackable

TRIAL_LENGTHS = (23, 37)  # long enough that wrong positions change the states by more than bf16 rounds
COLUMNS = 64  # the cache is read in multiples of it: a kernel would pad other masks, in every layer
TRIAL_PARENTS = (0, 0, 2)  # two tokens behind the root, and one behind the second of them


class _RaggedLayer(DynamicLayer):
    """One layer's keys and values. Where they are written, and how far they are read, the cache says."""

    def __init__(self, cache: RaggedCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        # Zeros: what is masked counts nothing, and nothing times NaN would be NaN.
        b, capacity = self.cache.batch, self.cache.capacity
        self.keys, self.values = (x.new_zeros(b, x.shape[1], capacity, x.shape[3]) for x in (keys, values))
        self.device, self.is_initialized = keys.device, True

    def update(
        self,
        key_states: Tensor,  # [b, Hkv, n, D] of the rows that the cache says
        value_states: Tensor,  # [b, Hkv, n, D]
        *_args: object,
        **_kwargs: object,
    ) -> tuple[Tensor, Tensor]:  # [b, Hkv, W, D] each
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, width = self.cache.rows, self.cache.width
        keys, values = (self.keys, self.values) if rows is None else (self.keys[rows], self.values[rows])
        keys.scatter_(2, self.cache.place(key_states.shape), key_states)
        values.scatter_(2, self.cache.place(value_states.shape), value_states)
        return keys[:, :, :width], values[:, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width


class RaggedCache(Cache):
    """Keys and values of B sequences of at most `capacity` tokens each, made by `prefill` and extended by `run`."""

    def __init__(self, target: Target, batch: int, capacity: int):
        super().__init__(layer_class_to_replicate=lambda: _RaggedLayer(self))
        self.target, self.batch = target, batch
        self.capacity = -(-capacity // COLUMNS) * COLUMNS
        self.slots = torch.empty(0, 0, dtype=torch.int64)  # [b, n] columns that the forward under way writes
        self.rows: slice | None = None  # of the sequences that it runs; None: all
        self.width = 0
        self._places: dict[torch.Size, Tensor] = {}
        self._stores: list[Tensor] = []  # [layers, B, Hkv, capacity, D], of which the layers' keys and values are parts

    def place(self, shape: torch.Size) -> Tensor:  # [b, Hkv, n, D] int64
        """Where the forward under way writes states of a shape, made for its first layer."""
        if shape not in self._places:
            self._places[shape] = self.slots[:, None, :, None].expand(shape)
        return self._places[shape]

    def prefill(
        self,
        prompts: list[list[int]],  # B of them, those of like length behind each other
    ) -> tuple[
        Tensor, Tensor
    ]:  # g [B, L, 3*Ht], f [B, Ht] of each prompt's last token; rows past a prompt's end are fillers
        """Runs the prompts, padded on the right: attention is causal, so no token of a prompt sees the padding, and what
        follows the prompt is written over it. At most RUN_TOKENS tokens run together."""
        longest, first, lasts = max(map(len, prompts)), 0, []
        width = len(self.target.layers) * self.target.hidden_size
        g = torch.zeros(len(prompts), longest, width, dtype=self.target.dtype, device=self.target.device)
        while first < len(prompts):
            end = first + 1
            while end < len(prompts) and (end + 1 - first) * max(map(len, prompts[first : end + 1])) <= RUN_TOKENS:
                end += 1
            part, self.rows = prompts[first:end], slice(first, end)
            n = max(map(len, part))
            ids = torch.tensor([prompt + [0] * (n - len(prompt)) for prompt in part])
            column = torch.arange(n)
            sees = (torch.arange(self.columns(n)) <= column[:, None])[None]
            g[first:end, :n], f = self._forward(ids, column.repeat(len(part), 1), column.repeat(len(part), 1), sees)
            lasts.append(f[torch.arange(len(part)), [len(prompt) - 1 for prompt in part]])
            first = end
        self.rows = None
        self._join()
        return g, torch.cat(lasts)

    def columns(self, needed: int) -> int:
        return min(self.capacity, -(-needed // COLUMNS) * COLUMNS)

    def run(
        self,
        tokens: Tensor,  # [B, n] int64, the root of each sequence and the nodes of its tree, parents first
        parents: Tensor,  # [B, n-1] int64 on the host, of node 1 .. n-1; node 0 is the root
        roots: list[int],  # position of each root, which is how many tokens the sequence keeps
        last_position: int,  # of the target's context; nodes past it are fillers
    ) -> tuple[Tensor, Tensor]:  # g [B, n, 3*Ht], f [B, n, Ht]
        """A node sees what its sequence keeps, its ancestors and itself."""
        b, n = tokens.shape
        rows, own = torch.arange(b), torch.eye(n, dtype=torch.bool).repeat(b, 1, 1)
        for node in range(1, n):
            own[:, node] |= own[rows, parents[:, node - 1]]
        root = torch.tensor(roots)[:, None]
        slots = root + torch.arange(n)
        sees = (
            (torch.arange(self.columns(max(roots) + n)) < root)[:, None]
            .repeat(1, n, 1)
            .scatter(2, slots[:, None].expand(b, n, n), own)
        )
        positions = (root + own.sum(2) - 1).clamp_max(last_position)
        return self._forward(tokens, positions, slots, sees)

    def keep(
        self,
        roots: list[int],
        paths: Tensor,  # [B, k] int64 on the host: nodes that follow each other, the root first; fillers may follow
    ) -> None:
        """Moves the nodes of a path behind each other; what lies behind them is written over later."""
        if bool((paths == torch.arange(paths.shape[1])).all()):
            return
        root, device = torch.tensor(roots)[:, None], self.target.device
        source, place = (root + paths).to(device), (root + torch.arange(paths.shape[1])).to(device)
        for store in self._stores:
            shape = (*store.shape[:3], paths.shape[1], store.shape[4])
            moved = store.gather(3, source[None, :, None, :, None].expand(shape))
            store.scatter_(3, place[None, :, None, :, None].expand(shape), moved)

    def select(
        self,
        rows: list[int],
    ) -> None:
        """Keeps these sequences and forgets the others."""
        index, self.batch = torch.tensor(rows, device=self.target.device), len(rows)
        for number, store in enumerate(self._stores):
            self._stores[number] = store[:, index]
        self._give_parts()

    def _join(self) -> None:
        """Puts the keys and values of layers of one shape into one tensor, so that all are moved together."""
        kinds: dict[torch.Size, list[tuple[_RaggedLayer, str]]] = {}
        for layer in self.layers:
            for name in ("keys", "values"):
                kinds.setdefault(getattr(layer, name).shape, []).append((layer, name))
        self._owners = list(kinds.values())
        for owners in self._owners:
            store = torch.stack([getattr(layer, name) for layer, name in owners])
            for layer, name in owners:
                setattr(layer, name, None)
            self._stores.append(store)
        self._give_parts()

    def _give_parts(self) -> None:
        for store, owners in zip(self._stores, self._owners, strict=True):
            for part, (layer, name) in zip(store, owners, strict=True):
                setattr(layer, name, part)

    def _forward(
        self,
        ids: Tensor,  # [B, n] int64
        positions: Tensor,  # [B, n] int64
        slots: Tensor,  # [B, n] int64
        sees: Tensor,  # [B or 1, n, W] bool
    ) -> tuple[Tensor, Tensor]:
        device, dtype = self.target.device, self.target.dtype
        self.slots, self.width = slots.to(device), sees.shape[2]
        self._places.clear()
        hidden = ~sees.to(device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        return self.target.forward(ids.to(device), self, positions.to(device), mask.expand(len(ids), -1, -1, -1))


class SingleCache:
    """`RaggedCache` of one sequence, in transformers' own cache and under the model's own masks: for targets that cannot
    run several together, such as those with windows."""

    def __init__(self, target: Target):
        self.target, self.cache = target, DynamicCache()

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:  # g [1, L, 3*Ht], f [1, Ht] of the last token
        (prompt,) = prompts
        g, f = self.target.forward(torch.tensor([prompt], device=self.target.device), self.cache)
        return g, f[:, -1]

    def run(
        self,
        tokens: Tensor,  # [1, n] int64
        parents: Tensor,  # [1, n-1] int64 on the host
        roots: list[int],
        _last_position: int,
    ) -> tuple[Tensor, Tensor]:  # g [1, n, 3*Ht], f [1, n, Ht]
        n, (root,) = tokens.shape[1], roots
        self.num_run = n
        if bool((parents[0] == torch.arange(n - 1)).all()):  # a chain: the model's own mask
            return self.target.forward(tokens, self.cache)
        sees = torch.eye(n, dtype=torch.bool)
        for node, parent in enumerate(parents[0].tolist(), 1):
            sees[node] |= sees[parent]
        mask = torch.zeros(sees.shape, dtype=self.target.dtype).masked_fill_(~sees, torch.finfo(self.target.dtype).min)
        positions = (sees.sum(1) - 1 + root).to(tokens.device)
        mask = F.pad(mask, (root, 0)).to(tokens.device)
        return self.target.forward(tokens, self.cache, positions[None], mask[None, None])

    def keep(self, roots: list[int], paths: Tensor) -> None:
        """Leaves the tokens before the root and the path's; the other verified tokens' keys and values go."""
        (path,), (root,) = paths.tolist(), roots
        kept = len(path)
        if path != list(range(kept)):
            for layer in self.cache.layers:
                for x in (layer.keys, layer.values):
                    x[:, :, root : root + kept] = x[:, :, [root + node for node in path]]
        if kept < self.num_run:
            self.cache.crop(kept - self.num_run)


@torch.no_grad()
def why_apart(target: Target) -> str | None:
    """Why this target decodes one sequence at a time; None where it may decode many, which a trial has shown."""
    if reason := unpackable(target.decoder.config):
        return reason
    ids = torch.arange(1, 1 + sum(TRIAL_LENGTHS) + 8, device=target.device) * 7 % target.vocab_size
    prompts = [part.tolist() for part in ids[: sum(TRIAL_LENGTHS)].split(TRIAL_LENGTHS)]
    nodes = ids[sum(TRIAL_LENGTHS) :].view(2, 4)
    try:
        cache = RaggedCache(target, 2, max(TRIAL_LENGTHS) + 4)
        cache.prefill(prompts)
        parents = torch.tensor([TRIAL_PARENTS] * 2)
        _, f = cache.run(nodes, parents, list(TRIAL_LENGTHS), max(TRIAL_LENGTHS) + 4)
    except Exception as error:  # of transformers, or the model's own code
        return f"a forward of several sequences fails: {first_line(error)}"
    off = []
    for row, prompt in enumerate(prompts):
        for path in ([0], [0, 1], [0, 2], [0, 2, 3]):
            alone = target.forward(torch.tensor([prompt + nodes[row, path].tolist()], device=target.device))[1][0, -1]
            off.append((f[row, path[-1]] - alone).float().norm() / alone.float().norm())
    # In bf16 another kernel's rounding may lead a few rows to other experts.
    whole = target.dtype.itemsize > 2
    worst = float(torch.stack(off).max() if whole else torch.stack(off).median())
    if not worst <= (1e-3 if whole else 0.05):
        return f"several sequences together give states that are off by {worst:.1%}"
    return None
