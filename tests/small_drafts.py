"""Small random drafts of every method of blocks with packs and features, and their engine beside their reference."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.block_work import HEADS, block_engine
from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import StepLoss
from fastdraft.model.dflash.ref import block_ref_step
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.methods import method_of

FIELDS = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    num_target_layers=8,
    layers=(1, 5),
    block_size=5,
    mask_token_id=39,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    max_position_embeddings=256,
)
LENGTHS = (19, 1, 2, 7, 23)  # of a pack's documents


def dflash_shape(**changes) -> DFlashConfig:
    """16 wide, 4 heads of 8 over 2, two layers that read two of eight, blocks of 5, vocabulary 40, mask token 39."""
    fields = FIELDS | changes
    fields.setdefault("layer_types", ("full_attention",) * fields["num_hidden_layers"])
    return DFlashConfig(**fields)


def dspark_shape(markov_rank: int = 6, **changes) -> DSparkConfig:
    """The same with a Markov head of rank 6."""
    return DSparkConfig(**dflash_shape(labels="shifted", **changes).model_dump(), markov_rank=markov_rank)


def dflash2_shape(**changes) -> DFlash2Config:
    """The same with convolutions of two taps over groups of 4 channels, and five candidates a slot, rank 6."""
    more = dict(conv_kernel_size=2, conv_group_size=4, selector_rank=6, selector_top_k=5)
    more |= {name: changes.pop(name) for name in more if name in changes}
    return DFlash2Config(**dflash_shape(**changes).model_dump() | more)


class Small:
    """A draft, a pack of documents with a patchy mask, its features and the target's head."""

    def __init__(self, config: DFlashConfig, lengths=LENGTHS, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        self.config = c = config
        self.draft = method_of(c).draft(c)
        plain = DFlashDraft(c)  # the method's layers, without what it has besides
        plain.init_weights(0.3, generator)
        for name, p in plain.named_parameters():
            if p.ndim == 1:
                p.data += 0.2 * torch.randn(p.shape, generator=generator)
                assert "norm" in name
        self._add_own(plain.state_dict(), torch.Generator().manual_seed(seed + 1))
        self.draft.to(dtype).take_from_target(normal(c.vocab_size, c.hidden_size))
        n = sum(lengths)
        ids = torch.randint(c.vocab_size - 1, (n,), generator=generator)
        self.batch = Batch(ids, torch.rand(n, generator=generator) < 0.75, tuple(lengths))
        self.features = Features(normal(n, len(c.layers) * c.hidden_size), normal(n, c.hidden_size))
        self.head = TargetHead(normal(c.vocab_size, c.hidden_size))

    def _add_own(self, plain: dict[str, Tensor], generator: torch.Generator) -> None:
        """DFlash's weights, and the method's own: heads, convolutions and a selector that are large enough to matter."""
        self.draft.init_weights(0.6 if isinstance(self.config, DSparkConfig) else 0.3, generator)
        self.draft.load_state_dict(plain, strict=False)
        for name, p in self.draft.named_parameters():
            if "conv" in name or "selector" in name:
                p.data += 0.4 * torch.randn(p.shape, generator=generator)
            if name == "confidence_head.proj.bias":
                p.data.fill_(0.3)


def small_dflash(lengths=LENGTHS, dtype=torch.float64, seed=0, **changes) -> Small:
    return Small(dflash_shape(**changes), lengths, dtype, seed)


def small_dspark(lengths=LENGTHS, dtype=torch.float64, seed=0, **changes) -> Small:
    return Small(dspark_shape(**changes), lengths, dtype, seed)


def small_dflash2(lengths=LENGTHS, dtype=torch.float64, seed=0, **changes) -> Small:
    return Small(dflash2_shape(**changes), lengths, dtype, seed)


def anchors_of(case: Small, limit: int = 8) -> Tensor:
    return draw_anchors(case.batch, limit, seed=3, step=1)


def reference_step(case: Small, anchors: Tensor, loss: StepLoss) -> tuple[Rows, dict[str, Tensor]]:
    row_losses = HEADS[type(case.config)][1]
    return block_ref_step(case.draft, case.batch, case.features, case.head, anchors, loss, row_losses=row_losses)


def engine_step(
    case: Small, anchors: Tensor, loss: StepLoss, chunk_blocks: int | None = None
) -> tuple[Rows, dict[str, Tensor]]:
    engine = block_engine(case.draft, case.head, loss, lambda *_: anchors, chunk_blocks)
    grads = flat_gradients(case.draft.trainable())
    return engine.step(case.batch, case.features, grads), grads


def compare(case: Small, loss: StepLoss, chunk_blocks: int, tolerance: float, anchors: Tensor | None = None) -> None:
    """Rows and gradients of the engine against the reference's, as shares of their largest value."""
    anchors = anchors_of(case) if anchors is None else anchors
    rows, grads = reference_step(case, anchors, loss)
    ours, found = engine_step(case, anchors, loss, chunk_blocks)
    assert torch.equal(rows.live, ours.live) and torch.equal(rows.hit, ours.hit) and bool(rows.live.any())
    torch.testing.assert_close(ours.loss, rows.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.acceptance, rows.acceptance, rtol=tolerance, atol=tolerance)
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        untrained = name.startswith("candidate_selector") and loss.selector_alpha == 0
        assert untrained or bool(grad.any()), f"{name} has no gradient, so nothing is compared"
        error = float((found[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"
