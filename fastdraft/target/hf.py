"""The frozen target, run by transformers: any decoder whose layers can be hooked.

Capture runs a pack's documents one after the other in one row (`target/packed.py`) where a model can: tried and compared
when it is built. Any other model gets documents of like length together, right-padded and causal with no attention mask at
all: a real token never sees padding, so documents cannot see each other, whatever attention the model uses; `apart` says
why. Three forward hooks keep the outputs of the layers the draft reads; no other layer's state is kept.

# N packed tokens, B documents run together, L their longest, Ht target hidden, V target vocabulary
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fastdraft.batch import Batch, Features, PackShare, TargetHead
from fastdraft.cost import TargetSizes
from fastdraft.dist.mesh import Axis
from fastdraft.model.graph import GraphPool
from fastdraft.model.target_config import (
    default_layers,
    first_line,
    language_config,
    refuse_strange_dtype,
    silent_layers,
)
from fastdraft.target.packed import (
    Documents,
    Recorded,
    cuts,
    in_pack_order,
    own_slices,
    packed,
    unpackable,
    windows_of,
)
from fastdraft.target.sharded import Lockstep, load_sharded, local

GRAPH_FLOPS = 2e13  # of a forward; from there on a GPU takes longer than the host does for its launches
GRAPH_TOKENS = 256  # packs are padded to multiples of it, so that few lengths are recorded
PROBE_TOKENS = 8
# Names under which config.json keeps what lies between lm_head and the logits. One model multiplies by what another divides
# by (logits_scaling: HyperCLOVA X, Granite) or ignores (logit_scale: MPT), so all are tried, and its own logits decide.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Names under which config.json keeps how many experts a layer has, and how many of them a token goes through.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
LONGEST_TRIAL = 4096  # tokens of a window that is tried before the first step
# PyTorch's attention without cuDNN's, which it prefers on Hopper GPUs: cuDNN makes a plan for every new shape, and while
# tokens are generated every forward has one.
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RUN_TOKENS = 16384  # of documents that run together: what the target's own activations take is bounded so


class Target:
    """A causal LM from `load` or one already built. Everything it gives is without gradient."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: tuple[int, ...] | None = None,
        holders: Axis | None = None,  # the processes that hold it together, of `load_sharded`; None: it is whole here
        sequence: Axis | None = None,  # the processes that share a pack's tokens; None: each has packs of its own
    ):
        self.model = model.eval().requires_grad_(False)
        self.sequence = sequence or Axis()
        self.holders = holders or Axis()
        self.lockstep: Lockstep | None = None  # while this object is made, all processes run the same
        self.config = model.config.get_text_config()
        self.decoder, blocks = _decoder_and_layers(model)
        self.num_layers = len(blocks)
        self.layers = tuple(layers) if layers is not None else default_layers(self.num_layers)
        inside = all(0 <= layer < self.num_layers for layer in self.layers)
        if not inside or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{self.num_layers - 1}, the target's layers"
                + ("; the default needs a target of at least 7 layers" if self.num_layers < 7 else "")
            )
        self._states: dict[int, Tensor] = {}
        self._capturing = False
        for place, index in enumerate(self.layers):
            blocks[index].register_forward_hook(self._keep(place))
        heads = _heads(model, self.config)
        self.vocab_size, self.hidden_size = heads[0].weight.shape
        self.embedding = _embedding(model, self.vocab_size)
        generation = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = generation if generation is not None else getattr(self.config, "eos_token_id", None)
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        self.head = self._proven_head(heads, blocks)
        self.final_norm = _final_norm(self.decoder)
        self.num_parameters = sum(p.numel() for p in self.decoder.parameters())
        self.windows: list[int | None] = []  # what layers said of theirs in the last forward that was shared
        self.recorded: dict[int, Recorded] | None = None  # by tokens; None: forwards are no CUDA graphs
        self.apart = unpackable(self.decoder.config) or self._try_packing()
        self.pool = GraphPool()
        if self.sequence.size > 1:
            self._refuse_unshared()
        if self.holders.size > 1:  # a CUDA graph records no collective
            self.lockstep = Lockstep(self.holders, self._idle)
        elif self.sequence.size == 1 and self.apart is None and self.device.type == "cuda" and self._try_recording():
            self.recorded = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def _keep(self, place: int):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._capturing:
                self._states[place] = output if torch.is_tensor(output) else output[0]

        return hook

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,  # [B, L] int64
        cache: Cache | None = None,
        position_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, 1, L, cached + L], for tree verification
    ) -> tuple[Tensor, Tensor]:  # g [B, L, 3*Ht], f [B, L, Ht]
        """One forward of the decoder without the vocabulary projection; extends `cache` when given."""
        if self.lockstep is not None:
            self.lockstep.enter()
        self._capturing = True
        try:
            f = self.decoder(
                input_ids=input_ids,
                **{cache_name(self.decoder): cache},
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
            ).last_hidden_state
            g = torch.cat([self._states[place] for place in range(len(self.layers))], -1)
            return g.to(self.dtype), f.to(self.dtype)  # Mamba's residual stream is fp32 whatever its weights are
        finally:
            self._capturing = False
            self._states.clear()

    def meet(self) -> None:
        """Returns when no process that holds this target with others has a forward to run; a whole target's at once. Each
        of them calls it before it turns to anything else that all processes do together."""
        if self.lockstep is not None:
            self.lockstep.wait()

    @torch.no_grad()
    def _idle(self) -> None:
        self.decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)

    def capture(self, batch: Batch) -> Features:
        """g and f of every token of a packed batch, each document on its own."""
        if self.apart is not None:
            return self._capture_apart(batch)
        runs = [self.forward_packed(ids, lengths) for ids, lengths in self.packed_runs(batch)]
        return Features(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*runs, strict=True)))

    def capture_share(
        self,
        batch: Batch,  # the same on all processes that share its tokens
        halo: int,  # rows of f behind each slice
    ) -> Features:  # g of the rows that this process owns, f of these and its halos: `PackShare`
        """Each process runs every layer on its own rows of the pack, and all of them call this together.

        Raises ValueError where they were given different packs.
        """
        axis, n = self.sequence, batch.num_tokens
        share = PackShare(n, axis.rank, axis.size, halo)
        fingerprint = zlib.crc32(batch.input_ids.cpu().numpy().tobytes() + repr(batch.lengths).encode())
        if axis.largest(fingerprint) != -axis.largest(-fingerprint):
            raise ValueError(
                "processes that share a pack's tokens (dist.sequence) were given different packs; each group of them must "
                "read the same data, in the same order"
            )
        # Rows past the pack's end, which make all slices equally long, are a document of their own that nobody sees.
        c = share.slice_rows
        ids = F.pad(batch.input_ids.to(self.device), (0, 2 * axis.size * c - n))
        lengths = batch.lengths + ((len(ids) - n,) if len(ids) > n else ())
        own_ids = own_slices(ids, axis.rank, axis.size)
        documents = Documents.shared(lengths, axis, self.device)
        g, f = self._run_packed(own_ids, documents)
        self.windows = documents.windows

        # A halo is the first rows of slices that others own, so all exchange as many of each slice. What is asked for is
        # then taken out of the own rows, slice by slice, and those behind them.
        h = min(halo, c)
        heads = in_pack_order(axis.gather(torch.cat([f[:h], f[c : c + h]])), axis.size)
        places = {axis.rank: 0, 2 * axis.size - 1 - axis.rank: c}
        start = torch.tensor([places.get(s, 2 * c + s * h) - s * c for s in range(2 * axis.size)])
        own, more = ((rows + start[rows // c]).to(self.device) for rows in (share.rows, share.rows_and_halo))
        return Features(g[own], torch.cat([f, heads])[more])

    def packed_runs(self, batch: Batch) -> Iterator[tuple[Tensor, tuple[int, ...]]]:  # token ids [n], documents' lengths
        """Documents that run together: up to RUN_TOKENS, or one that is longer."""
        runs: list[list[int]] = []
        room = 0
        for length in batch.lengths:
            if length > room:
                runs.append([])
                room = RUN_TOKENS
            runs[-1].append(length)
            room -= length
        ids = batch.input_ids.to(self.device).split([sum(run) for run in runs])
        return zip(ids, map(tuple, runs), strict=True)

    @torch.no_grad()
    def forward_packed(
        self,
        input_ids: Tensor,  # [n] int64, documents one after the other
        lengths: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:  # g [n, 3*Ht], f [n, Ht]
        n = -(-len(input_ids) // GRAPH_TOKENS) * GRAPH_TOKENS
        if self.recorded is not None and 2 * self.num_parameters * n <= GRAPH_FLOPS:
            if n not in self.recorded:
                self.recorded[n] = Recorded(n, self._run_packed, self.device, self.pool)
            return self.recorded[n](input_ids, lengths)
        return self._run_packed(input_ids, Documents.of(lengths, self.device))

    def _run_packed(self, input_ids: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        with packed(self.decoder.config, documents):
            g, f = self.forward(input_ids[None], position_ids=documents.position[None])
        return g[0], f[0]

    def _capture_apart(self, batch: Batch) -> Features:
        n, width = batch.num_tokens, self.hidden_size
        g = torch.empty(n, len(self.layers) * width, dtype=self.dtype, device=self.device)
        f = torch.empty(n, width, dtype=self.dtype, device=self.device)
        ids, starts = batch.input_ids.to(self.device), [0, *accumulate(batch.lengths)]
        for group in _groups_of_like_length(batch.lengths):
            longest = batch.lengths[group[0]]
            padded = ids.new_zeros(len(group), longest)
            for row, d in enumerate(group):
                padded[row, : batch.lengths[d]] = ids[starts[d] : starts[d + 1]]
            g_rows, f_rows = self.forward(padded)
            for row, d in enumerate(group):
                g[starts[d] : starts[d + 1]] = g_rows[row, : batch.lengths[d]]
                f[starts[d] : starts[d + 1]] = f_rows[row, : batch.lengths[d]]
        return Features(g, f)

    def _try_packing(self) -> str | None:
        """Why documents must run apart: what a packed forward fails with, or that it is not what each alone gives."""
        lengths = (9, 4, 14)
        ids = torch.arange(sum(lengths), device=self.device) * 7 % self.vocab_size
        try:
            _, f = self.forward_packed(ids, lengths)
        except Exception as error:  # of transformers, the model's own code, or a kernel that this GPU cannot run
            return f"a packed forward fails: {first_line(error)}"
        alone = torch.cat([self.forward(part[None])[1][0] for part in ids.split(lengths)])
        first = [9, 13]  # tokens that see only themselves: no rounding of another kernel grows, no other expert is chosen
        for rows, most in ((first, 0.05), (slice(None), 0.3)):
            off = ((f[rows] - alone[rows]).float().norm() / alone[rows].float().norm()).item()
            if not off <= most:
                return f"packed documents give states that are off by {off:.1%}"
        return None

    def _refuse_unshared(self) -> None:
        """ValueError where rows that are computed by several processes would not be what one computes: where attention is
        not known, or tokens meet elsewhere (convolutions, recurrences), which a trial shows."""
        config = self.decoder.config
        windows = windows_of(config)
        cut = sorted({window for window in windows if window is not None})
        windowed = cut or "sliding_attention" in (getattr(config, "layer_types", None) or ())
        why = unpackable(config, shared=True) if windowed else self.apart
        if why is None:
            # The first document is longer than a window, if that is not too long for a trial.
            lengths = (9 + (cut[0] if cut and cut[0] <= LONGEST_TRIAL else 0), 4, 14)
            ids = torch.arange(sum(lengths)) * 7 % self.vocab_size
            batch = Batch(ids, torch.ones(len(ids), dtype=torch.bool), lengths)
            share = PackShare(len(ids), self.sequence.rank, self.sequence.size)
            whole = self._capture_apart(batch).f if windowed else self.forward_packed(ids.to(self.device), lengths)[1]
            whole = whole[share.rows.to(self.device)].float()
            try:
                ours = self.capture_share(batch, 0).f.float()
            except ValueError as error:  # of an attention that is not known
                raise ValueError(self._unshared(first_line(error))) from error
            # The state of a token whose embedding is zero, as padding's is in some models, may be zero, too.
            off = (ours - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            # In bf16 another kernel's rounding may lead a few rows to other experts.
            found = float(off.max() if self.dtype.itemsize > 2 else off.median()) if len(off) else 0.0
            found = self.sequence.largest(int(1e6 * found) if found < 1e3 else 10**9) / 1e6  # NaN is not below
            if windowed and [cuts(config, window) for window in self.windows] != windows:
                why = f"its config has windows of {cut} tokens, which its layers do not name when they attend"
            elif found > (1e-3 if self.dtype.itemsize > 2 else 0.1):
                why = f"its states are off by {found:.1%} then"
        if why is not None:
            raise ValueError(self._unshared(why))

    def _unshared(self, why: str) -> str:
        return (
            f"dist.sequence={self.sequence.size}: processes cannot share a pack's tokens with the target "
            f"{type(self.model).__name__}, because {why}; set dist.sequence=1, and dist.target=sharded if the target does "
            "not fit on one GPU"
        )

    def _try_recording(self) -> bool:
        """Whether a forward can be a CUDA graph. One that reads values on the host, as routing to experts may, cannot."""
        if 2 * self.num_parameters * GRAPH_TOKENS > GRAPH_FLOPS:
            return False
        recorded = Recorded(GRAPH_TOKENS, self._run_packed, self.device, GraphPool())
        ids = torch.arange(8, device=self.device) % self.vocab_size
        try:
            first, _, replayed = (recorded(ids, (5, 3)) for _ in range(3))
        except RuntimeError:
            return False
        return all(torch.equal(a, b) for a, b in zip(first, replayed, strict=True))

    @torch.no_grad()
    def _proven_head(self, heads: list[TargetHead], blocks: nn.ModuleList) -> TargetHead:
        """The head that gives the model's own logits, or every teacher would be wrong. ValueError where none does."""
        name = type(self.model).__name__
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.vocab_size
        g, f = self._first_forward(ids, blocks)
        shape = (1, PROBE_TOKENS, len(self.layers) * self.hidden_size)
        if g.shape != shape:
            raise ValueError(
                f"the layers {list(self.layers)} of {name} give states {tuple(g.shape)} for {PROBE_TOKENS} tokens, not "
                f"{shape}: it carries more than one state a token, or one of another width than its lm_head reads, which "
                "no draft reads"
            )
        self._refuse_looking_ahead(f, ids)
        # The model's head is given states of every size, so that a cap or a norm shows, which near 0 are like nothing.
        raw = heads[0].weight.new_tensor([1, 3, 10, 30, 100, 300, 1000, 3000], dtype=torch.float32)
        largest = torch.nn.functional.linear(f, heads[0].weight).float().abs().amax(-1, keepdim=True)
        sized = (f.float() * raw[:, None] / largest.clamp_min(1e-6)).to(f.dtype)
        states = torch.cat([f, sized], 1)  # as they are, too: a bias shows best in small ones
        theirs = self._logits_of(states, ids)
        if not (theirs.isfinite().all() and _is_finite(self.embedding)):  # rows of it that nothing here has read
            if bad := [name for name, weight in self.model.named_parameters() if not _is_finite(weight)]:
                more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
                raise ValueError(
                    f"the target's weights hold NaN or Inf: {', '.join(bad[:3])}{more}; its files are damaged, or it was "
                    "saved so; download it again"
                )
            raise ValueError(
                f"the target's logits are not finite in {self.dtype}, though all its weights are: a state overflows; set "
                "another target.dtype"
            )
        scale = theirs.abs().amax(-1)
        errors = [(head.logits(states).float() - theirs).abs().amax(-1) for head in heads]
        for head, error in zip(heads, errors, strict=True):
            if bool((error <= 0.02 * scale).all()):
                return head
        row = int((errors[0] / scale).argmax())
        off, largest_there = errors[0].flatten()[row].item(), scale.flatten()[row].item()
        fields = {k: v for k, v in self.config.to_dict().items() if re.search(r"logit|soft_?cap|multiplier|mup", k)}
        raise ValueError(
            f"{name} turns its last hidden state into logits in a way fastdraft does not know: lm_head with logit scaling "
            f"{heads[0].scale} and soft-capping {heads[0].softcap} is off by {off:.3g} where the largest logit is "
            f"{largest_there:.3g}. Its config.json says {fields or 'nothing of scales or caps'}; please "
            "report the model"
        )

    def _first_forward(self, ids: Tensor, blocks: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """`forward`, with a sentence where the model cannot run on text alone, or a chosen layer is left out then."""
        ran: set[int] = set()
        hooks = [block.register_forward_hook(lambda *_, i=i: ran.add(i)) for i, block in enumerate(blocks)]
        name = type(self.model).__name__
        try:
            self.decoder(input_ids=ids, use_cache=False)
        except Exception as error:  # of the model's own code, which may raise anything
            raise ValueError(
                f"{name} does not run on {len(ids[0])} tokens of text alone: {type(error).__name__}: {first_line(error)}; "
                "a target must be a causal LM that transformers runs on token ids"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if silent := [layer for layer in self.layers if layer not in ran]:
            raise ValueError(silent_layers(silent, self.layers, ran, name))
        return self.forward(ids)

    def _refuse_looking_ahead(self, f: Tensor, ids: Tensor) -> None:
        """ValueError where other tokens at the end change the states of those before them."""
        half = ids.shape[1] // 2
        others = torch.cat([ids[:, :half], (ids[:, half:] + half) % self.vocab_size], 1)
        before, after = f[0, :half].float(), self.forward(others)[1][0, :half].float()
        # The least of the rows: rounding may lead one of them to other experts, but tokens that look ahead change them all.
        off = ((before - after).norm(dim=-1) / before.norm(dim=-1)).min().item()
        if off > 0.05:  # NaN is told of later
            raise ValueError(
                f"{type(self.model).__name__} lets tokens see those that follow (other ones change their states by "
                f"{off:.0%}); a target must be a causal LM, which some models are only with is_decoder or causal: true in "
                "their config.json"
            )

    def _logits_of(self, states: Tensor, ids: Tensor) -> Tensor:  # states [1, n, Ht], ids [1, m], logits [1, n, V] fp32
        """What the model's own code makes of last hidden states, m at a time: its decoder's output is replaced."""

        parts = iter(states.split(ids.shape[1], 1))

        def replaced(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (next(parts), *output[1:])
            output.last_hidden_state = next(parts)
            return output

        hook = self.decoder.register_forward_hook(replaced)
        try:
            logits = [
                self.model(input_ids=ids, use_cache=False).logits.float() for _ in range(states.shape[1] // ids.shape[1])
            ]
        finally:
            hook.remove()
        return torch.cat(logits, 1)


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its key/value cache: transformers has renamed the argument, and models that bring their
    own code keep the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def load_target(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str,
    layers: tuple[int, ...] | None = None,
    trust_remote_code: bool = False,
    run_in: torch.dtype | None = None,
    holders: Axis | None = None,
    sequence: Axis | None = None,
) -> Target:
    """Loads a local directory or hub name. Raises ValueError saying what is missing when it is not a whole causal LM.

    `run_in` computes with the weights rounded to `dtype` in another: in torch.float32 they are the same numbers, so the
    target has the same fingerprint. Quantized weights stay as they are. With `holders` each of these processes keeps its
    part of every layer (`target/sharded.py`); all of them call this. Those on `sequence` share a pack's tokens
    (`Target.capture_share`).
    """
    if holders is not None and holders.size == 1:
        holders = None
    try:
        _look_at(path)
        if holders is not None:
            where = torch.device(device)
            model, missing = load_sharded(path, dtype, where, trust_remote_code, holders, _decoder_and_layers)
        else:
            more = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
            with _no_progress_bar(path):
                model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}, **more)
            missing = sorted(info["missing_keys"])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of transformers, safetensors or the model's own class, which may raise anything
        raise ValueError(f"target {path!r} cannot be loaded: {first_line(error)}") from error
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"target {path!r} lacks the weights {', '.join(missing[:3])}{more}; download it again")
    if run_in is not None and not getattr(model, "is_quantized", False):
        model = model.to(run_in)
    return Target(model, layers, holders, sequence)


@contextmanager
def _no_progress_bar(path: str) -> Iterator[None]:
    """transformers draws one for the weights it reads, in the middle of a command's own lines. A download keeps its bar."""
    shown = logging.is_progress_bar_enabled()
    if Path(path).is_dir():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_target_config(path: str, trust_remote_code: bool = False) -> dict:
    """The target's config.json as a dict, without its weights."""
    try:
        _look_at(path)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
    except Exception as error:  # of transformers, or the model type's own class, which may raise anything
        raise ValueError(f"target {path!r} has no readable config.json: {first_line(error)}") from error


def target_sizes(config: dict) -> TargetSizes:
    """What a plan needs of a target's config.json, counted on an empty model: no weights are read."""
    model, facts = _empty_model(config), language_config(config)
    _, blocks = _decoder_and_layers(model)
    experts = next((n for name in EXPERTS if isinstance(n := facts.get(name), int) and n), 1)
    told = next((n for name in CHOSEN if isinstance(n := facts.get(name), int) and n), None)
    chosen = told or experts
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    idle = 0  # parameters of experts that a token does not go through
    for block in blocks:
        for name, p in block.named_parameters():
            if experts > 1 and p.shape[0] == experts and ("experts" in name.split(".") or p.ndim == 3):
                idle += p.numel() * (experts - chosen) // experts
    # Where experts are named, their weights or how many run may not be found.
    known = idle > 0 or told == experts or not any("expert" in name and value for name, value in facts.items())
    heads, hidden = facts.get("num_attention_heads") or 0, facts["hidden_size"]  # 0: a target without attention
    head_dim = facts.get("head_dim") or hidden // max(heads, 1)
    mlp = facts.get("moe_intermediate_size") or facts.get("intermediate_size") or 4 * hidden
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    return TargetSizes(
        num_layers=len(layers),
        layers=sum(layers),
        largest_layer=max(layers),
        outside=total - sum(layers),
        active=sum(layers) - idle + head,
        hidden_size=hidden,
        kv_width=2 * (facts.get("num_key_value_heads") or heads) * head_dim,
        attention_width=heads * head_dim,
        mlp_width=mlp * (chosen if experts > 1 else 1),
        apart=unpackable(model.config.get_text_config(), shared=True),
        idle=idle if known else None,
    )


def _empty_model(config: dict) -> PreTrainedModel:
    sizes = copy.deepcopy(config)  # transformers writes into what it is given
    for key in ("dtype", "torch_dtype"):
        sizes.pop(key, None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    except Exception as error:  # of transformers, or the model's own class, which may raise anything
        raise ValueError(
            f"transformers has no causal LM for the target's config.json ({config.get('model_type', 'no model_type')}), or "
            f"cannot build it: {first_line(error)}; a target must be a causal LM that it knows"
        ) from error


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The target's tokenizer.json. A tekken.json (Mistral) is read only where that is missing, by the package
    mistral-common, and made into the same kind: that package's own tokenizer has no chat template and no offsets."""
    try:
        _look_at(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, mistral_format=False)
    except Exception as error:  # of transformers, tokenizers, or the tokenizer's own code, which may raise anything
        if isinstance(error, ImportError) and "mistral" in str(error):
            raise ValueError(
                f"target {path!r} has a tekken.json and no tokenizer.json, which the package mistral-common makes of it: "
                "pip install mistral-common, or put the model's tokenizer.json beside it"
            ) from error
        raise ValueError(f"target {path!r} has no readable tokenizer: {first_line(error)}") from error
    if not hasattr(tokenizer, "is_fast"):
        raise ValueError(
            f"the tokenizer of target {path!r} was loaded as {type(tokenizer).__name__}, which has no chat template and no "
            "character offsets; put the model's tokenizer.json into its folder, or uninstall mistral-common"
        )
    return tokenizer


def _look_at(path: str) -> None:
    """Says of a folder that is absent, or whose config.json names a strange dtype, what transformers says less well."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith(".")
    if not on_hub and not Path(path).exists():
        raise ValueError("there is no such folder")
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong, or finds it on the hub
        return
    if isinstance(config, dict):
        refuse_strange_dtype(config)


def _is_finite(weight: Tensor) -> bool:
    """Its sum is, which takes no memory. Of weights in 8 bits nothing is said; of a sharded one the part here counts."""
    weight = local(weight)
    return weight.element_size() == 1 or bool(weight.sum(dtype=torch.float64).isfinite())


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    return getattr(model, "model", model) if decoder is model else decoder  # Llama 4's own is not found


def _decoder_and_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    decoder, count = _decoder(model), getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    fitting = [m for m in lists if len(m) == count]
    if not fitting:
        there = ", ".join(str(len(m)) for m in lists) or "none"
        raise ValueError(
            f"{type(model).__name__} has no list of num_hidden_layers = {count} layers that could be hooked (its lists of "
            f"modules: {there}); a target must be a causal LM whose decoder is one list of layers"
        )
    return decoder, fitting[0]


def _final_norm(decoder: nn.Module) -> Tensor | None:  # [Ht]
    """Weight of the decoder's final norm, where that computes x / rms(x) * weight (Gemma's is 1 + weight)."""
    norm = getattr(decoder, "norm", None)
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    x = torch.linspace(-1, 2, len(weight), device=weight.device)
    with torch.no_grad():
        theirs = norm(x.to(weight.dtype)).float()
    ours = x * x.pow(2).mean().rsqrt() * weight.float()
    return weight if torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())) else None


def _embedding(model: PreTrainedModel, vocab_size: int) -> Tensor:  # [V, Ht]
    """The rows of tokens that the model can say. Behind them Mllama keeps 8 for pictures, which no text holds."""
    weight = model.get_input_embeddings().weight
    if len(weight) < vocab_size:
        raise ValueError(
            f"{type(model).__name__} has an embedding of {len(weight)} tokens and an lm_head of {vocab_size}; a target "
            "must read every token that it can say"
        )
    return weight[:vocab_size]


def _heads(model: PreTrainedModel, config: PretrainedConfig) -> list[TargetHead]:
    """What the head may be by config.json, the likeliest first."""
    linear = model.get_output_embeddings()
    if linear is None:
        raise ValueError(f"{type(model).__name__} has no output embedding (lm_head); a target must be a causal LM")
    factors = [x for name in SCALES if isinstance(x := getattr(config, name, None), (int, float)) and x not in (0, 1)]
    scales = [math.prod(chosen) for chosen in itertools.product(*((x, 1 / x, 1) for x in factors))]
    caps = [x for name in SOFTCAPS if isinstance(x := getattr(config, name, None), (int, float)) and x]
    bias = getattr(linear, "bias", None)
    return [TargetHead(linear.weight, bias, scale, cap) for cap in (*caps, None) for scale in scales]


def _groups_of_like_length(
    lengths: tuple[int, ...], least_fill: float = 0.8, most_tokens: int = RUN_TOKENS
) -> list[list[int]]:
    """Documents to run together: longest first, none shorter than `least_fill` of its group's longest."""
    groups: list[list[int]] = []
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[d] >= least_fill * longest and (len(groups[-1]) + 1) * longest <= most_tokens:
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups
