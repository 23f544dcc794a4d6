"""NeMo Automodel's online EAGLE-3 training step beside ours: python -m bench.peers.automodel --checkout DIR [--tiny]

Both train the same draft on the same packs of conversations against the same random target of Llama-3.1-8B's layer shape
(--layers of them), which stays in memory for both. A round is --packs packs forward through the target and forward and
backward through the draft, and one optimizer step. Printed, and written to fleet.jsonl in the folder that --out names, are
tokens a second, peak memory, and the loss of each pack of the first round, before any weight has changed.

What Automodel's recipe does around its modules is done here by calling them in its order (`train_eagle3.py`): its target
wrapper `HFEagle3TargetModel.generate_batch` with the packing arguments its loader makes, `Eagle3TrainerModule`, backward,
`clip_grad_norm_` and torch's AdamW, all in bf16 on a GPU. Differences that were chosen:

- Its draft's attention is `eager` unless flash_attn is installed, which --peer-attention flash_attention_2 asks for; the
  recipe's own examples have both.
- The loss mask. Its row t is marked by loss_mask[t + 1], ours by the token that the row predicts, loss_mask[t + 2]: it gets
  the mask shifted by one, and `doc_remaining` is what remains until the last row that predicts a token of its document.
- Its loss is a mean over the rows of each step; ours is brought into the same form from sums.

Several processes share each pack, which is then one document, all trained on (Automodel's context parallel refuses packs):

    torchrun --standalone --nproc-per-node 4 -m bench.peers.automodel --checkout DIR --pack-tokens 32768 --packs 2

Ours is `dist.sequence`; Automodel's is its context parallel for target and draft, with the ring in order (`automodel`, its
default) and with the ring that deals the causal work evenly (`automodel-zigzag`, its `cp_zigzag`). Its trainer is not
wrapped in DistributedDataParallel, which would have nobody to share gradients with here. Its ring needs flash_attn 2.8;
where that is not installed PyTorch's copy of the same kernels stands in (`torch_flash.py`), and the rows say so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bench.peers import torch_flash
from bench.timing import append
from bench.work import (
    CHATS,
    SHAPES,
    chat_batches,
    draft_ids,
    live_batch,
    llama_config,
    make_draft,
    random_target,
    target_config,
)
from fastdraft.batch import Batch, Features
from fastdraft.config import Config, parse_config
from fastdraft.dist import mesh
from fastdraft.dist.shard import SharedAdamW
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.methods import method_of
from fastdraft.target.hf import Target

T = 7
GIB = 2**30
PROVIDERS = ("ours", "automodel", "automodel-zigzag")  # ours first: another's hooks stay on the target


def weighted_mean(
    sums: Tensor,  # [T] of each step's losses
    counts: Tensor,  # [T] rows of each step
) -> float:
    """Automodel's loss: each step's mean, weighed by 0.8^i."""
    weights = 0.8 ** torch.arange(len(sums), dtype=torch.float64)
    return float((weights * sums.cpu().double() / counts.cpu().double().clamp_min(1)).sum() / weights.sum())


class Ours:
    """Online training as `train.py` does it, by one process or by several that share each pack's tokens."""

    def __init__(self, model: nn.Module, shape: DraftConfig, batches: list[Batch], config: Config):
        self.sequence = mesh.axis("sequence")
        self.batches, self.target = batches, Target(model, shape.layers, sequence=self.sequence)
        device, dtype = self.target.device, self.target.dtype
        draft = make_draft(shape, dtype, device).float()
        self.optimizer = SharedAdamW(draft.trainable(), config.optim, 1000, dtype, mesh.axis("replicas"))
        draft.to(dtype)
        groups = (mesh.axis("tensor"), self.sequence) if self.sequence.size > 1 else ()
        self.engine = method_of(draft).build_step(config, draft, self.target.head, device, *groups)

    def capture(self, batch: Batch) -> Features:
        if self.sequence.size > 1:
            return self.target.capture_share(batch, halo=T)
        return self.target.capture(batch.to(self.target.device))

    def round(self) -> list[float]:  # the loss of each pack
        by_pack = []
        for batch in self.batches:
            features = self.capture(batch)
            self.optimizer.finish()
            by_pack.append(self.engine.step(batch, features, self.optimizer.grads).sums())
        of_packs = torch.stack(by_pack)  # [packs, 5, T]
        self.optimizer.start(of_packs.sum(0))
        self.optimizer.finish()
        self.sequence.sum_(of_packs)
        return [weighted_mean(sums[0], sums[3]) for sums in of_packs]


class Automodel:
    """The same by the modules of a checkout."""

    def __init__(
        self,
        model: nn.Module,
        shape: DraftConfig,
        batches: list[Batch],
        config: Config,
        checkout: Path,
        attention: str,
        zigzag: bool = False,  # of several processes: how their ring deals out the tokens
    ):
        if not (checkout / "nemo_automodel").is_dir():
            raise ValueError(
                f"{checkout} has no folder nemo_automodel; --checkout needs the root of a NeMo Automodel checkout"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        self.ring = mesh.axis("sequence")
        if self.ring.size > 1:
            torch_flash.install()
        from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule
        from nemo_automodel.components.speculative.eagle.draft_llama import (
            LlamaEagle3DraftModel,
            attach_eagle3_cp_attention,
        )
        from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel

        self.model = model
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        # `dtype` is also that of its rotation, else queries become fp32; the recipe has it from the target's config
        draft_config = llama_config(shape, 1 << 17, dtype=dtype)
        draft_config.target_hidden_size = shape.target_hidden_size
        draft_config.attn_implementation = attention
        draft_config.rope_theta = shape.rope_parameters["rope_theta"]
        with torch.device(device):
            draft = LlamaEagle3DraftModel(draft_config)
        draft = draft.to(device=device, dtype=dtype)
        state = {automodel_name(name): x for name, x in make_draft(shape, dtype, device).named_parameters()}
        missing, unknown = draft.load_state_dict(state, strict=False)
        if unknown or any("d2t" not in x and "t2d" not in x and "rotary" not in x for x in missing):
            raise ValueError(f"{checkout}'s draft has no {unknown} and has {missing} besides; it is another version")
        ids = draft_ids(shape).to(device)
        draft.set_vocab_mapping(ids)
        draft.freeze_embeddings()
        in_draft = torch.zeros(shape.vocab_size, dtype=torch.bool, device=device)
        in_draft[ids] = True
        shared: dict[str, Any] = {}
        self.rows = None  # of a pack, those that this process's draft runs; None: all
        if self.ring.size > 1:
            group = init_device_mesh(device.type, (self.ring.size,), mesh_dim_names=("cp",))
            shared = {"cp_group": group.get_group(), "cp_zigzag": zigzag}
            attach_eagle3_cp_attention(draft, shared["cp_group"], zigzag=zigzag)
            self.rows = ring_rows(batches[0].num_tokens, self.ring.rank, self.ring.size, zigzag).to(device)
            without_hooks(model)
            self.target = HFEagle3TargetModel(model, aux_layer_ids=list(shape.layers), cp_mesh=group)
        else:
            self.target = HFEagle3TargetModel(model, aux_layer_ids=list(shape.layers))
        trainer = Eagle3TrainerModule(draft, selected_token_ids=ids, selected_token_mask=in_draft, ttt_steps=T, **shared)
        self.trainer, optim = trainer.to(device), config.optim
        self.trained = [p for p in self.trainer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        self.clip = optim.clip
        inputs_of = packed_inputs if self.rows is None else document_inputs
        self.inputs = [{name: x.to(device) for name, x in inputs_of(batch).items()} for batch in batches]

    def own_inputs(self, features: Any) -> dict[str, Tensor]:
        """What the trainer gets of a target's batch: with a ring its own rows, as `_maybe_shard_cp` of the recipe cuts."""
        inputs = features.to_trainer_inputs()
        if self.rows is None:
            return inputs
        return {name: x[:, self.rows] for name, x in inputs.items()} | {"position_ids": self.rows[None]}

    def round(self) -> list[float]:
        losses = []
        for inputs in self.inputs:
            loss = self.trainer(**self.own_inputs(self.target.generate_batch(**inputs))).loss
            (loss / len(self.inputs)).backward()
            losses.append(loss.detach())
        for p in self.trained if self.ring.size > 1 else ():
            self.ring.sum_(p.grad)
        torch.nn.utils.clip_grad_norm_(self.trainer.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [float(loss) for loss in losses]


def automodel_name(name: str) -> str:
    """Its name of a parameter of ours."""
    if name.startswith("lm_head."):
        return name
    return "model." + name.replace("midlayer.", "layers.0.")


def packed_inputs(batch: Batch) -> dict[str, Tensor]:  # [1, N] each, seq_lens [1, D]
    """What Automodel's loader hands over for a packed sequence, for the rows that we train on."""
    mask, n = batch.loss_mask, batch.num_tokens
    left = batch.doc_end - torch.arange(n) - 2
    return {
        "input_ids": batch.input_ids[None],
        "attention_mask": torch.ones(1, n, dtype=torch.int64),
        "loss_mask": torch.cat([mask[1:], mask.new_zeros(1)])[None].long(),
        "position_ids": batch.positions[None],
        "seq_lens": torch.tensor([batch.lengths]),
        "doc_remaining": left.clamp_min(0)[None],
    }


def document_inputs(batch: Batch) -> dict[str, Tensor]:  # [1, N] each
    """The same of a pack that is one document, which Automodel's loader does not mark."""
    whole = packed_inputs(batch)
    return {name: whole[name] for name in ("input_ids", "attention_mask", "loss_mask")}


def ring_rows(n: int, rank: int, size: int, zigzag: bool) -> Tensor:  # [n / size] int64
    """The rows of a sequence that a process of Automodel's ring has: a piece, or an early piece and a late one."""
    if n % (2 * size):
        raise ValueError(f"packs of {n} tokens are shared by {size} processes; --pack-tokens needs multiples of {2 * size}")
    pieces = torch.arange(n).chunk(2 * size)
    places = (rank, 2 * size - 1 - rank) if zigzag else (2 * rank, 2 * rank + 1)
    return torch.cat([pieces[place] for place in places])


def without_hooks(model: nn.Module) -> None:
    """Takes the hooks off a target's attention that another of Automodel's wrappers put there."""
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                hooks.clear()
            for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                hooks.clear()


def measure(name: str, make: Callable[[], Any], rounds: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """A trainer made, run and let go: the losses of its first round, and its time and memory in the later ones."""
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer, times = make(), []
    first = trainer.round()
    for _ in range(rounds):
        mesh.barrier()
        start = time.perf_counter()
        trainer.round()
        times.append(mesh.largest(int(1e6 * (time.perf_counter() - start))) / 1e6)
    peak = mesh.largest(torch.cuda.max_memory_allocated() if on_gpu else 0) / GIB
    row = {"provider": name, "tokens_per_s": round(tokens / statistics.median(times), 1), "peak_gib": round(peak, 3)}
    row |= {"seconds": [round(t, 4) for t in times], "first_losses": [round(x, 6) for x in first]}
    return row | {"first_loss": round(float(np.mean(first)), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="root of a NeMo Automodel checkout")
    parser.add_argument("--layers", type=int, default=32, help="of the target")
    parser.add_argument("--pack-tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed ones, after one that warms up and whose losses are compared"
    )
    parser.add_argument("--peer-attention", choices=["eager", "flash_attention_2"], default="eager")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all that the number of processes has")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to see that it runs")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--out", type=Path, help="folder of fleet.jsonl")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    args = parser.parse_args()
    device = mesh.start_process("cpu" if args.tiny else "cuda")
    mesh.lay_out(sequence=mesh.world())
    providers = [name for name in PROVIDERS if name in (args.providers or PROVIDERS[: 2 + (mesh.world() > 1)])]
    precision = args.dtype or ("fp32" if args.tiny else "bf16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    shape = SHAPES["tiny" if args.tiny else "llama-3.1-8b"]
    layers = 8 if args.tiny else args.layers
    shape = shape.model_copy(update={"layers": (1, layers // 2 - 1, layers - 4), "num_target_layers": layers})
    tree = {"target": {"path": "random"}, "data": {"paths": ["random"]}, "precision": precision}
    tree |= {"optim": {"optimizer": "adamw"}, "loss": {"step_decay": 0.8}}  # which is what Automodel trains with
    config = parse_config(tree, Config)
    model = random_target(target_config(shape, layers, max_position_embeddings=1 << 17), dtype, device)
    ring_attention = "flash_attn" if importlib.util.find_spec("flash_attn") else "PyTorch's FlashAttention"
    for pack_tokens in [48] if args.tiny else args.pack_tokens:
        if mesh.world() > 1:
            batches = [live_batch(shape, pack_tokens)] * args.packs
        else:
            batches = tiny_batches(shape) if args.tiny else chat_batches(shape, pack_tokens, CHATS, args.packs)
        tokens = sum(batch.num_tokens for batch in batches)
        about = {"layers": layers, "pack_tokens": pack_tokens, "packs": len(batches), "tokens": tokens}
        about |= {"gpus": mesh.world(), "peer_attention": args.peer_attention}
        if mesh.world() > 1:
            about["peer_attention"] = ring_attention
        peer = partial(Automodel, model, shape, batches, config, args.checkout, args.peer_attention)
        make = {
            "ours": partial(Ours, model, shape, batches, config),
            "automodel": peer,
            "automodel-zigzag": partial(peer, zigzag=True),
        }
        for name in providers:
            try:
                row = about | measure(name, make[name], args.rounds, tokens, device)
            except torch.OutOfMemoryError as error:
                row = about | {"provider": name, "out_of_memory": str(error).splitlines()[0]}
            if not mesh.is_rank_0():
                continue
            print(json.dumps(row), flush=True)
            if args.out:
                append("fleet/automodel", row, args.commit, args.out)
    mesh.end_process()


def tiny_batches(shape: DraftConfig) -> list[Batch]:
    """Packs of two documents each, of which some tokens are not trained on."""
    ids = live_batch(shape, 96).input_ids.split(48)
    masks = torch.arange(48) % 5 > 0, torch.arange(48) % 7 < 4
    return [Batch(x, mask, (15 + k, 33 - k)) for k, (x, mask) in enumerate(zip(ids, masks, strict=True))]


if __name__ == "__main__":
    main()
