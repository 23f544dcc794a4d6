"""What a block step is timed on: shapes of real drafts, random weights and features, anchors, and its FLOPs.

Weights, features and anchors come from fixed seeds: every provider gets the same. f, which only a provider with a teacher
reads, is SURE times the head's row of the document's next token. The head's rows have norm 1, so the teacher chooses it.

# N packed tokens, K captured layers, H hidden, V vocabulary, A anchors, B rows of a block, L draft layers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config

from bench.work import SURE
from fastdraft.batch import Batch, Features, Group, TargetHead
from fastdraft.kernels.block_attention import block_rows
from fastdraft.model.dflash.blocks import BlockChunk, draw_anchors, plan_blocks
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.head import TokenHead
from fastdraft.model.dflash.loss import BlockLoss, StepLoss, default_gamma
from fastdraft.model.dflash.ref import BlockReferenceEngine, token_losses_ref
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.ref import selector_losses_ref
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.head import DSparkHead
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.ref import dspark_losses_ref
from fastdraft.model.methods import METHODS, method_of

BLOCK_METHODS = ("dflash", "dspark", "dflash2")
# What the engine and the reference have beside DFlash's layers, by the draft's shape: the head, and the losses of its rows.
HEADS = {
    DFlashConfig: (TokenHead, token_losses_ref),
    DSparkConfig: (DSparkHead, dspark_losses_ref),
    DFlash2Config: (SelectorHead, selector_losses_ref),
}
Draw = Callable[[Batch, int], Tensor]  # the anchors of a batch in an optimizer step


def block_engine(
    draft: DFlashDraft,  # of any method of blocks
    head: TargetHead,
    loss: StepLoss,
    draw: Draw,
    chunk_blocks: int | None = None,
    made: type[BlockEngine] = BlockEngine,
    sequence: Group | None = None,
) -> BlockEngine:
    """The fused engine of a draft's own method."""
    mixer = ConvolutionMixer(draft) if draft.config.mixes else None
    return made(draft, head, loss, draw, chunk_blocks, HEADS[type(draft.config)][0], mixer, sequence)


def block_reference(draft: DFlashDraft, head: TargetHead, loss: StepLoss, draw: Draw) -> BlockReferenceEngine:
    """The reference of a draft's own method."""
    return BlockReferenceEngine(draft, head, loss, draw, HEADS[type(draft.config)][1])


def _shape(
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    layers: tuple[int, ...],
    target_layers: int,
    mask: int,
) -> DFlashConfig:
    return DFlashConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        num_target_layers=target_layers,
        layers=layers,
        mask_token_id=mask,
        layer_types=("full_attention",) * len(layers),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6},
        max_position_embeddings=1 << 20,
    )


SHAPES = {
    "tiny": _shape(32, 48, 4, 2, 8, 96, (1, 2), 5, 95),  # for trying things on a CPU
    "smollm2-135m": _shape(576, 1536, 9, 3, 64, 49152, (1, 14, 27), 30, 49151),
    "qwen3-8b": _shape(4096, 12288, 32, 8, 128, 151936, (1, 9, 17, 25, 33), 36, 151669),
    "llama-3.1-8b": _shape(4096, 14336, 32, 8, 128, 128256, (1, 8, 15, 22, 29), 32, 128255),
}


def block_shape(name: str, method: str, block_size: int) -> DFlashConfig:
    """A shape above for a method, whose own widths are its defaults."""
    shape = METHODS[method].shape
    fields = SHAPES[name].model_dump() | {"block_size": block_size, "labels": shape.served_labels}
    if method == "dspark" and name == "tiny":
        fields |= {"markov_rank": 8}
    return shape.of(fields)


def default_loss(method: str, kind: str, block_size: int) -> StepLoss:
    """As `fastdraft train` has it. ValueError for a loss that the method has not."""
    gamma = default_gamma(block_size)
    if method == "dspark":
        if kind != "ce":
            raise ValueError(f"DSpark has one loss, of three terms, and {kind} was asked for; leave --loss out")
        return DSparkLoss(gamma)
    return SelectorLoss(kind, gamma) if method == "dflash2" else BlockLoss(kind, gamma)


@dataclass(frozen=True)
class BlockWork:
    """What one round of every provider has to do: each pack forward and backward, and an optimizer step after it."""

    config: DFlashConfig
    batches: list[Batch]  # on the host
    features: list[Features]  # on the device
    anchors: list[Tensor]  # [A] int64 of each batch, ascending, on the host
    loss: StepLoss
    dtype: torch.dtype
    device: torch.device

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.anchors)) * self.config.block_size

    @property
    def num_trained(self) -> int:
        """Rows that have a label."""
        plans = (whole_plan(self.config, *pair) for pair in zip(self.batches, self.anchors, strict=True))
        return sum(len(plan.head_row) for plan in plans)

    @property
    def unit(self) -> tuple[str, int]:
        """What times are divided by."""
        return "row", self.num_rows

    @property
    def flops(self) -> int:
        return sum(
            sum(flop_parts(self.config, batch, anchors, self.loss.needs_teacher).values())
            for batch, anchors in zip(self.batches, self.anchors, strict=True)
        )

    def rates(self, whole_us: float, model_us: float) -> dict[str, float]:
        """What a row says besides, of a round's time with and without the optimizer."""
        tokens = sum(batch.num_tokens for batch in self.batches)
        return {
            "us_per_trained_token": round(whole_us / self.num_trained, 3),
            "model_us_per_trained_token": round(model_us / self.num_trained, 3),
            "rows": self.num_rows,
            "tokens": tokens,
            "tokens_per_s": round(tokens / whole_us * 1e6),
        }

    @property
    def input_bytes(self) -> int:
        """Of the largest pack, and without f where the loss needs no teacher."""
        sizes = []
        for features, batch in zip(self.features, self.batches, strict=True):
            teacher = features.f.nbytes if self.loss.needs_teacher else 0
            sizes.append(features.g.nbytes + batch.input_ids.nbytes + teacher)
        return max(sizes)


def make_block_work(
    config: DFlashConfig,
    batches: list[Batch],
    anchors: int,  # of a document at most
    loss: StepLoss,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockWork:
    head = make_head(config, dtype, device).weight
    generator = torch.Generator(device).manual_seed(2)
    features, width = [], config.hidden_size
    for batch in batches:
        g = torch.randn(batch.num_tokens, len(config.layers) * width, dtype=dtype, device=device, generator=generator)
        features.append(Features(g, SURE * head[batch.input_ids.roll(-1).to(device)]))
    chosen = [draw_anchors(batch, anchors, seed=0, step=1) for batch in batches]
    return BlockWork(config, batches, features, chosen, loss, dtype, device)


def make_draft(config: DFlashConfig, dtype: torch.dtype, device: torch.device) -> DFlashDraft:
    """Vectors are 1 and matrices random; a convolution's own taps, [2, T, H], stay the identity that they begin as."""
    with torch.device(device):
        draft = method_of(config).draft(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            if p.ndim == 1:
                p.fill_(1.0)
            elif p.ndim == 2:
                p.normal_(0.0, config.initializer_range, generator=generator)
    draft.take_from_target(make_embedding(config, dtype, device))
    return draft


def qwen3_config(config: DFlashConfig) -> Qwen3Config:
    """The layers as transformers names them, of which the peers build theirs."""
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings")
    return Qwen3Config(
        **{name: getattr(config, name) for name in same},
        rope_parameters={"rope_type": "default", **config.rope_parameters},
        layer_types=list(config.layer_types),
        sliding_window=config.sliding_window,
        use_sliding_window=config.sliding_window is not None,
        attention_bias=False,
    )


def make_embedding(config: DFlashConfig, dtype: torch.dtype, device: torch.device) -> Tensor:  # [V, H]
    generator = torch.Generator(device).manual_seed(4)
    size = (config.vocab_size, config.hidden_size)
    return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(config.initializer_range)


def make_head(config: DFlashConfig, dtype: torch.dtype, device: torch.device) -> TargetHead:
    generator = torch.Generator(device).manual_seed(1)
    size = (config.vocab_size, config.hidden_size)
    weight = torch.randn(size, dtype=dtype, device=device, generator=generator)
    for part in weight.split(8192):
        part /= part.norm(dim=1, keepdim=True)
    return TargetHead(weight)


def without_mask_token(batches: list[Batch], config: DFlashConfig) -> list[Batch]:
    """The same with token 0 for the mask's, which no text has, and the first B tokens of each document not trained on.

    speculators lets a block's labels run into the next document and leaves it to the loss mask to stop them; so all train
    on the same rows.
    """
    found = []
    for batch in batches:
        ids = torch.where(batch.input_ids == config.mask_token_id, 0, batch.input_ids)
        mask = batch.loss_mask & (torch.arange(batch.num_tokens) >= batch.doc_start + config.block_size)
        found.append(Batch(ids, mask, batch.lengths))
    return found


def whole_plan(config: DFlashConfig, batch: Batch, anchors: Tensor) -> BlockChunk:
    """All blocks as one chunk."""
    return next(plan_blocks(batch, anchors, config, len(anchors), 1 << 40))


def flop_parts(config: DFlashConfig, batch: Batch, anchors: Tensor, needs_teacher: bool) -> dict[str, int]:
    """FLOPs that the mathematics needs for one step, 2 a multiply-add: matrix products only, none computed twice. `own` is
    those of the weights that the method has beside DFlash's (`own_layer_weights` of each row, `own_head_weights` of each
    live one). Where rows are mixed, all rows run all layers.

    With R = A B rows, U = A + 1 rows of layer 0 that differ, K' live rows, m positions whose target distribution is read,
    E = Hq*D, kv = Hkv*D and a factor 3 for forward, input gradient and weight gradient (2 where one is not needed):

        fc      2 * KH*H * N * 2               K, V of the context       2 * L * H*2kv * N * 3
        q       2 * H*E * q_l * 3              k, v                      2 * H*2kv * r_l * 3
        o, MLP  2 * (E*H + 3*H*I) * o_l * 3    head 2 * H*V * K' * 2     teacher 2 * H*V * m

    Rows r_l that need keys and values are all R, in layer 0 U. Rows o_l that go on are all R, in the last layer K'. q_l is
    o_l, but no more than U in layer 0. Attention: 4 * E * 3.5 * sum over rows o_l of the keys that they see.
    """
    c, n, plan = config, batch.num_tokens, whole_plan(config, batch, anchors)
    h, e, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    rows, distinct, live = len(plan.row_position), len(plan.read_id), len(plan.head_row)
    blocks, seen = 0, 0
    for layer, kind in enumerate(c.layer_types):
        last = layer == c.num_hidden_layers - 1 and not c.mixes
        on, keyed = live if last else rows, rows if layer or c.mixes else distinct
        blocks += 3 * (h * e * min(on, keyed) + 2 * h * kv * keyed + (e * h + 3 * h * c.intermediate_size) * on)
        sliding = kind == "sliding_attention"
        window = c.sliding_window if sliding else None
        found = block_rows(plan.anchor, plan.start, c.block_size, plan.head_row if last else None, window, causal=sliding)
        seen += int((found.ctx_end - found.ctx_start).sum() + (found.blk_end - found.blk_start).sum())
    return {
        "context": 2 * n * (2 * len(c.layers) * h * h + 3 * c.num_hidden_layers * 2 * h * kv),
        "layers": 2 * blocks,
        "head": 2 * h * c.vocab_size * (2 * live + needs_teacher * len(plan.teacher_pos)),
        "attention": int(3.5 * 4 * e * seen),
        "own": 6 * (c.num_hidden_layers * rows * c.own_layer_weights + live * c.own_head_weights),
    }
