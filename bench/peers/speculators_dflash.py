"""speculators' DFlash step on the same weights, inputs and anchors: its `DFlashDraftModel` from an installed package.

`pip install --no-deps --target DIR speculators==0.9.0` fills the folder. The package's own first lines import its data
tools and with them openai and more, of which the model needs nothing. So packages of it that are not loaded yet are entered
without their first lines, and what is imported then is the model's own code as it is; it needs torch, triton, transformers
and pydantic. Its trainer's forward under autocast is called here; on a GPU it compiles itself, and its fused loss runs.

- Labels. Its cross entropy is against the teacher's choice, which here is the document's next token (`block_work`): the
  same labels. It computes its teacher at every step, and that is in its time, as in its trainer.
- Anchors are ours where it would draw its own (`select_anchors`), padded to as many for all packs, as its trainer has.
- A pack is padded to one width for all packs, at least a block wider than the longest, because labels are gathered there.
- Its fused loss is two Triton kernels with one list of tile sizes, which PyTorch 2.11's compiler refuses to trace. They run
  as they are, between what is compiled. Its trainer's other choice, the eager loss, is compiled with the rest.
- Its loss is divided by the number of live rows; `losses` multiplies that back, and so does what is differentiated.
- Its trainer shards weights with FSDP, computes in bf16 and steps float32 masters. Here one process has both: bf16 weights,
  and masters in a fused torch.optim.AdamW behind its clipping. Its default is Muon, which takes longer.
"""

from __future__ import annotations

import importlib
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.block_work import BlockWork, make_draft, make_embedding, make_head, qwen3_config
from fastdraft.config import OptimConfig

# S tokens of a padded pack, A anchors of the pack that has most

WIDTH = 128  # packs are padded to a multiple


class SpeculatorsDFlash:
    """A provider (`bench.providers`)."""

    late_moments = True
    per_token_bytes = None

    def __init__(self, work: BlockWork, folder: Path, loss: str = "fused"):
        core = load(folder)
        from speculators.config import reload_schemas
        from speculators.losses import resolve_loss_config
        from speculators.models.dflash import DFlashSpeculatorConfig

        reload_schemas()  # the last of the package's first lines

        c = work.config
        on_gpu = work.device.type == "cuda"
        layers = qwen3_config(c)
        layers._attn_implementation = "simple_flex_attention" if on_gpu else "eager"
        config = DFlashSpeculatorConfig(
            transformer_layer_config=layers,
            draft_vocab_size=c.vocab_size,
            block_size=c.block_size,
            aux_hidden_state_layer_ids=[layer + 1 for layer in c.layers],
            mask_token_id=c.mask_token_id,
        )
        with torch.device(work.device):
            draft = core.DFlashDraftModel(config)
        draft = draft.to(work.dtype)
        state = make_draft(c, work.dtype, work.device).state_dict()
        missing, unknown = draft.load_state_dict(state, strict=False)
        others = ("rotary", "embed_tokens", "lm_head", "verifier_norm")
        if unknown or any(not any(other in name for other in others) for name in missing):
            raise ValueError(f"{folder}'s draft lacks {unknown} and has {missing} besides; it is another version")
        del state
        with torch.no_grad():
            draft.embed_tokens.weight.copy_(make_embedding(c, work.dtype, work.device))
            for head in (draft.lm_head, draft.verifier_lm_head):
                head.weight.copy_(make_head(c, work.dtype, work.device).weight)
            draft.verifier_norm.weight.fill_(1.0)
        self.draft, self.core, self.dtype = draft, core, work.dtype
        core.select_anchors = lambda *_: self.chosen
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        optim = OptimConfig()
        self.clip = optim.clip
        self.optimizer = torch.optim.AdamW(self.masters, lr=optim.lr, weight_decay=optim.weight_decay, fused=on_gpu)
        self.autocast = torch.autocast(work.device.type, torch.bfloat16) if work.dtype == torch.bfloat16 else nullcontext()
        losses = resolve_loss_config("ce", loss if on_gpu else "eager")
        if loss == "fused":
            losses = {name: (torch.compiler.disable(f), weight) for name, (f, weight) in losses.items()}
        self.options = {
            "loss_config": losses,
            "gamma": work.loss.gamma,
            "max_anchors": max(map(len, work.anchors)),
            "per_position_loss_weight": {"ce": "fixed-exp-decay", "dpace": "dpace"}[work.loss.kind],
            "dpace_alpha": work.loss.dpace_alpha,
        }
        width = max(batch.num_tokens for batch in work.batches) + c.block_size
        self.width = -(-width // WIDTH) * WIDTH
        self.own_inputs = 0
        self.packs = [self.padded(work, k) for k in range(len(work.batches))]

    def padded(self, work: BlockWork, k: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """A pack as its trainer hands it over, each [1, S, ...], and the anchors [A] with those that are none."""
        batch, features, room = work.batches[k], work.features[k], self.options["max_anchors"]

        def pad(x: Tensor, size: int, value: int = 0) -> Tensor:
            full = x.new_full((size, *x.shape[1:]), value)
            full[: len(x)] = x
            return full.to(work.device)

        document = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        inputs = {
            "hidden_states": pad(features.g, self.width),
            "input_ids": pad(batch.input_ids, self.width),
            "loss_mask": pad(batch.loss_mask.long(), self.width),
            "verifier_last_hidden_states": pad(features.f, self.width),
            "document_ids": pad(document, self.width, -1),
            "position_ids": pad(batch.positions, self.width),
        }
        self.own_inputs += inputs["hidden_states"].nbytes + inputs["verifier_last_hidden_states"].nbytes
        anchors = work.anchors[k]
        there = pad(torch.ones(len(anchors), dtype=torch.bool), room)
        return {name: x[None] for name, x in inputs.items()}, (pad(anchors, room), there)

    def model(self, k: int) -> None:
        """Forward and backward of pack k."""
        inputs, self.chosen = self.packs[k]
        with self.autocast:
            _, loss, metrics = self.draft(**inputs, **self.options)
        live = metrics["full_acc_total"] + 1e-5
        (loss * live).backward()
        self.sum = loss.detach().double() * live

    @torch.no_grad()
    def update(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)
        for master in self.masters:
            master.grad = None

    def losses(self) -> Tensor:  # [1] the last pack's sum of weighted losses
        return self.sum[None]


def load(folder: Path) -> types.ModuleType:
    """speculators.models.dflash.core, without the first lines of the packages above it."""
    if not (folder / "speculators" / "models" / "dflash").is_dir():
        raise ValueError(
            f"{folder} has no speculators with DFlash; pip install --no-deps --target {folder} speculators==0.9.0"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for name in ("speculators", "speculators.models"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
            sys.modules[name] = package
    from speculators.config import SpeculatorModelConfig

    sys.modules["speculators"].SpeculatorModelConfig = SpeculatorModelConfig
    return importlib.import_module("speculators.models.dflash.core")
