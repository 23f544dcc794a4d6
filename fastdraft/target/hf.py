"""The frozen target, run by transformers: any decoder whose layers can be hooked.

Capture runs a pack's documents one after the other in one row (`target/packed.py`) where a model can: tried and compared
when it is built. Any other model gets documents of like length together, right-padded and causal with no attention mask at
all: a real token never sees padding, so documents cannot see each other, whatever attention the model uses; `apart` says
why. Three forward hooks keep the outputs of the layers the draft reads; no other layer's state is kept.

# N packed tokens, B documents run together, L their longest, Ht target hidden, V target vocabulary
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.model.config import default_layers
from fastdraft.target.packed import Documents, Recorded, packed, unpackable

GRAPH_FLOPS = 2e13  # of a forward; from there on a GPU takes longer than the host does for its launches
GRAPH_TOKENS = 256  # packs are padded to multiples of it, so that few lengths are recorded
RUN_TOKENS = 16384  # of documents that run together: what the target's own activations take is bounded so


class Target:
    """A causal LM from `load` or one already built. Everything it gives is without gradient."""

    def __init__(self, model: PreTrainedModel, layers: tuple[int, int, int] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.decoder = _decoder(model)
        blocks = _decoder_layers(self.decoder, self.config.num_hidden_layers)
        self.num_layers = len(blocks)
        self.layers = tuple(layers) if layers is not None else default_layers(self.num_layers)
        if not 0 <= self.layers[0] < self.layers[1] < self.layers[2] < self.num_layers:
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{self.num_layers - 1}, the target's layers"
                + ("; the default needs a target of at least 7 layers" if self.num_layers < 7 else "")
            )
        self._states: dict[int, Tensor] = {}
        self._capturing = False
        for place, index in enumerate(self.layers):
            blocks[index].register_forward_hook(self._keep(place))
        self.embedding = model.get_input_embeddings().weight
        self.vocab_size, self.hidden_size = self.embedding.shape
        self.head = _head(model, self.config)
        generation = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = generation if generation is not None else self.config.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        self._prove_head()
        self.final_norm = _final_norm(self.decoder)
        self.num_parameters = sum(p.numel() for p in self.decoder.parameters())
        self.recorded: dict[int, Recorded] | None = None  # by tokens; None: forwards are no CUDA graphs
        self.apart = unpackable(self.decoder.config) or self._try_packing()
        if self.apart is None and self.device.type == "cuda" and self._try_recording():
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
        self._capturing = True
        try:
            f = self.decoder(
                input_ids=input_ids,
                **{cache_name(self.decoder): cache},
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
            ).last_hidden_state
            return torch.cat([self._states[place] for place in range(3)], -1), f
        finally:
            self._capturing = False
            self._states.clear()

    def capture(self, batch: Batch) -> Features:
        """g and f of every token of a packed batch, each document on its own."""
        if self.apart is not None:
            return self._capture_apart(batch)
        runs = [self.forward_packed(ids, lengths) for ids, lengths in self.packed_runs(batch)]
        return Features(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*runs, strict=True)))

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
        g = torch.empty(n, 3 * width, dtype=self.dtype, device=self.device)
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
            return f"a packed forward fails: {_first_line(error)}"
        alone = torch.cat([self.forward(part[None])[1][0] for part in ids.split(lengths)])
        first = [9, 13]  # tokens that see only themselves: no rounding of another kernel grows, no other expert is chosen
        for rows, most in ((first, 0.05), (slice(None), 0.3)):
            off = ((f[rows] - alone[rows]).float().norm() / alone[rows].float().norm()).item()
            if not off <= most:
                return f"packed documents give states that are off by {off:.1%}"
        return None

    def _try_recording(self) -> bool:
        """Whether a forward can be a CUDA graph. One that reads values on the host, as routing to experts may, cannot."""
        if 2 * self.num_parameters * GRAPH_TOKENS > GRAPH_FLOPS:
            return False
        self.pool = torch.cuda.graph_pool_handle()  # one for all: a replay's results are copied before the next
        recorded = Recorded(GRAPH_TOKENS, self._run_packed, self.device, self.pool)
        ids = torch.arange(8, device=self.device) % self.vocab_size
        try:
            first, _, replayed = (recorded(ids, (5, 3)) for _ in range(3))
        except RuntimeError:
            return False
        return all(torch.equal(a, b) for a, b in zip(first, replayed, strict=True))

    @torch.no_grad()
    def _prove_head(self) -> None:
        """The head read off the model must give the model's own logits, or every teacher would be wrong."""
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        g, f = self.forward(ids)
        if g.shape != (1, 8, 3 * self.hidden_size):
            raise ValueError(
                f"three layers of {type(self.model).__name__} give states {tuple(g.shape)} for 8 tokens, not "
                f"{(1, 8, 3 * self.hidden_size)}: it carries more than one state a token, which no draft reads"
            )
        ours = self.head.logits(f).float()
        theirs = self.model(input_ids=ids).logits.float()
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
        error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        if not error <= 0.02 * scale:
            raise ValueError(
                f"{type(self.model).__name__} turns its last hidden state into logits in a way fastdraft does not know: "
                f"lm_head with logit scaling {self.head.scale} and soft-capping {self.head.softcap} is off by {error:.3g} "
                f"(largest logit {scale:.3g}); please report the model"
            )


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its key/value cache: transformers has renamed the argument, and models that bring their
    own code keep the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def load_target(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str,
    layers: tuple[int, int, int] | None = None,
    trust_remote_code: bool = False,
    run_in: torch.dtype | None = None,
) -> Target:
    """Loads a local directory or hub name. Raises ValueError saying what is missing when it is not a whole causal LM.

    `run_in` computes with the weights rounded to `dtype` in another: in torch.float32 they are the same numbers, so the
    target has the same fingerprint. Quantized weights stay as they are.
    """
    try:
        with _no_progress_bar(path):
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map={"": device}, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"target {path!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"target {path!r} lacks the weights {', '.join(missing[:3])}{more}; download it again")
    if run_in is not None and not getattr(model, "is_quantized", False):
        model = model.to(run_in)
    return Target(model, layers)


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
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
    except (OSError, ValueError, KeyError, RecursionError, StrictDataclassError) as error:
        raise ValueError(f"target {path!r} has no readable config.json: {_first_line(error)}") from error


def count_target_parameters(config: dict) -> int:
    """Parameters of the target, counted on an empty model: no weights are read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RecursionError, StrictDataclassError) as error:
        raise ValueError(f"target {path!r} has no readable tokenizer: {_first_line(error)}") from error


def target_fingerprint(target: Target) -> str:
    """Names a target by what a draft depends on: its shape fields and 64 values of every weight. 16 hex digits."""
    fields = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers", "rope_parameters")
    config = target.config.to_dict()
    digest = hashlib.sha256(json.dumps({k: config.get(k) for k in fields}, sort_keys=True, default=str).encode())
    for weight in target.model.parameters():
        flat = weight.detach().flatten()
        digest.update(flat[:: -(-len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_fingerprint(path: str) -> str:
    """Names a checkpoint on disk without loading it: every tensor's name, shape and first 64 values, however they are
    spread over files. 16 hex digits. Raises ValueError when it is not in safetensors."""
    folder = Path(path) if Path(path).is_dir() else Path(cached_file(path, "config.json")).parent
    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                shape = part.get_shape()
                values = part[(*(slice(0, 1) for _ in shape[:-1]), slice(0, 64))] if shape else opened.get_tensor(name)
                found[name] = json.dumps([name, shape, values.float().flatten().tolist()]).encode()
    if not found:
        raise ValueError(f"target {path!r} has no *.safetensors files to tell its weights by; save it as safetensors")
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def _is_finite(weight: Tensor) -> bool:
    """Its sum is, which takes no memory; of weights in 8 bits nothing is said."""
    return weight.element_size() == 1 or bool(weight.sum(dtype=torch.float64).isfinite())


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    return getattr(model, "model", model) if decoder is model else decoder  # Llama 4's own is not found


def _decoder_layers(decoder: nn.Module, count: int) -> nn.ModuleList:
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(decoder).__name__} has no list of {count} layers that could be hooked; it is no decoder")
    return lists[0]


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


def _head(model: PreTrainedModel, config) -> TargetHead:
    linear = model.get_output_embeddings()
    if linear is None:
        raise ValueError(f"{type(model).__name__} has no output embedding (lm_head); a target must be a causal LM")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return TargetHead(
        weight=linear.weight,
        bias=getattr(linear, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
    )


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


def _first_line(error: Exception) -> str:
    if isinstance(error, StrictDataclassError):  # its second line says what is wrong
        return " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
