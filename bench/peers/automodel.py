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
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.timing import append
from bench.work import CHATS, SHAPES, chat_batches, draft_ids, live_batch, make_draft
from fastdraft.batch import Batch
from fastdraft.config import Config, parse_config
from fastdraft.dist.mesh import Axis
from fastdraft.dist.shard import SharedAdamW
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.methods import method_of
from fastdraft.target.hf import Target

T = 7
GIB = 2**30


def random_target(shape: DraftConfig, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    config = LlamaConfig(
        hidden_size=shape.target_hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def weighted_mean(
    sums: Tensor,  # [T] of each step's losses
    counts: Tensor,  # [T] rows of each step
) -> float:
    """Automodel's loss: each step's mean, weighed by 0.8^i."""
    weights = 0.8 ** torch.arange(len(sums), dtype=torch.float64)
    return float((weights * sums.cpu().double() / counts.cpu().double().clamp_min(1)).sum() / weights.sum())


class Ours:
    """Online training as `train.py` does it, with one process."""

    def __init__(self, model: nn.Module, shape: DraftConfig, batches: list[Batch], config: Config):
        self.batches, self.target = batches, Target(model, shape.layers)
        device, dtype = self.target.device, self.target.dtype
        draft = make_draft(shape, dtype, device).float()
        self.optimizer = SharedAdamW(draft.trainable(), config.optim, 1000, dtype, Axis())
        draft.to(dtype)
        self.engine = method_of(draft).build_step(config, draft, self.target.head, device)

    def round(self) -> list[float]:  # the loss of each pack
        losses, total = [], 0
        for batch in self.batches:
            features = self.target.capture(batch.to(self.target.device))
            self.optimizer.finish()
            sums = self.engine.step(batch, features, self.optimizer.grads).sums()
            losses.append((sums[0], sums[3]))
            total = total + sums
        self.optimizer.start(total)
        self.optimizer.finish()
        return [weighted_mean(*pair) for pair in losses]


class Automodel:
    """The same by the modules of a checkout."""

    def __init__(
        self, model: nn.Module, shape: DraftConfig, batches: list[Batch], config: Config, checkout: Path, attention: str
    ):
        if not (checkout / "nemo_automodel").is_dir():
            raise ValueError(
                f"{checkout} has no folder nemo_automodel; --checkout needs the root of a NeMo Automodel checkout"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule
        from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
        from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel

        self.model = model
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        draft_config = LlamaConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            rms_norm_eps=shape.rms_norm_eps,
            rope_parameters=dict(shape.rope_parameters),
            max_position_embeddings=1 << 17,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
        draft_config.draft_vocab_size, draft_config.target_hidden_size = shape.draft_vocab_size, shape.target_hidden_size
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
        self.target = HFEagle3TargetModel(model, aux_layer_ids=list(shape.layers))
        trainer = Eagle3TrainerModule(draft, selected_token_ids=ids, selected_token_mask=in_draft, ttt_steps=T)
        self.trainer, optim = trainer.to(device), config.optim
        self.trained = [p for p in self.trainer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        self.clip = optim.clip
        self.inputs = [{name: x.to(device) for name, x in packed_inputs(batch).items()} for batch in batches]

    def round(self) -> list[float]:
        losses = []
        for inputs in self.inputs:
            features = self.target.generate_batch(**inputs)
            loss = self.trainer(**features.to_trainer_inputs()).loss
            (loss / len(self.inputs)).backward()
            losses.append(loss.detach())
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
        start = time.perf_counter()
        trainer.round()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
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
    parser.add_argument("--providers", nargs="+", choices=["ours", "automodel"], default=["ours", "automodel"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in fp32 on a CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of fleet.jsonl")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    shape = SHAPES["tiny" if args.tiny else "llama-3.1-8b"]
    layers = 8 if args.tiny else args.layers
    shape = shape.model_copy(update={"layers": (1, layers // 2 - 1, layers - 4), "num_target_layers": layers})
    tree = {"target": {"path": "random"}, "data": {"paths": ["random"]}, "precision": "fp32" if args.tiny else "bf16"}
    config = parse_config(tree, Config)
    model = random_target(shape, layers, dtype, device)
    for pack_tokens in [48] if args.tiny else args.pack_tokens:
        batches = tiny_batches(shape) if args.tiny else chat_batches(shape, pack_tokens, CHATS, args.packs)
        tokens = sum(batch.num_tokens for batch in batches)
        about = {"layers": layers, "pack_tokens": pack_tokens, "packs": len(batches), "tokens": tokens}
        about |= {"peer_attention": args.peer_attention}
        make = {
            "ours": lambda batches=batches: Ours(model, shape, batches, config),
            "automodel": lambda batches=batches: Automodel(
                model, shape, batches, config, args.checkout, args.peer_attention
            ),
        }
        for name in args.providers:
            try:
                row = about | measure(name, make[name], args.rounds, tokens, device)
            except torch.OutOfMemoryError as error:
                row = about | {"provider": name, "out_of_memory": str(error).splitlines()[0]}
            print(json.dumps(row), flush=True)
            if args.out:
                append("fleet/automodel", row, args.commit, args.out)


def tiny_batches(shape: DraftConfig) -> list[Batch]:
    """Packs of two documents each, of which some tokens are not trained on."""
    ids = live_batch(shape, 96).input_ids.split(48)
    masks = torch.arange(48) % 5 > 0, torch.arange(48) % 7 < 4
    return [Batch(x, mask, (15 + k, 33 - k)) for k, (x, mask) in enumerate(zip(ids, masks, strict=True))]


if __name__ == "__main__":
    main()
