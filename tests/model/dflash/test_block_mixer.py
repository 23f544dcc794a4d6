"""A method that mixes rows of a block around attention and MLP: the engine with a mixer is the reference with `around`."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from drafting import One
from small_drafts import small_dflash
from torch import nn

from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import memory
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine, block_engine_step
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.dflash.ref import block_ref_step, block_states_ref

BRANCHES = ("attention", "mlp")


class MixedConfig(DFlashConfig):
    mixes: ClassVar[bool] = True


def before(x, rows):
    """The row before each row of its block [n, H], 0 for the first."""
    blocks = x.view(-1, rows, x.shape[-1])
    return torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], 1).view(x.shape)


def behind(x, rows):
    blocks = x.view(-1, rows, x.shape[-1])
    return torch.cat([blocks[:, 1:], torch.zeros_like(blocks[:, :1])], 1).view(x.shape)


class MixedDraft(DFlashDraft):
    """Each branch reads n + a * n_before and gives y + n * b * y_before: `b` makes the output side depend on n."""

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.mix = nn.ModuleDict(
            {
                f"{layer}_{branch}": nn.ParameterDict({"a": nn.Parameter(torch.ones(h)), "b": nn.Parameter(torch.ones(h))})
                for layer in range(config.num_hidden_layers)
                for branch in BRANCHES
            }
        )

    def around(self, layer, branch, n, run):
        mix, rows = self.mix[f"{layer}_{branch}"], self.config.block_size
        y = run(n + mix["a"] * before(n, rows))
        return y + n * mix["b"] * before(y, rows)


class RowMixer:
    """The same with its backward written out."""

    def __init__(self, draft):
        self.draft, self.rows, self.dn = draft, draft.config.block_size, {}

    def part(self, named, layer, branch, name):
        return named[f"mix.{layer}_{branch}.{name}"]

    def mix_in(self, step, layer, branch, n, x):
        x.copy_(n + self.part(step.named, layer, branch, "a") * before(n, self.rows))

    def mix_out(self, step, layer, branch, n, y, out):
        out.copy_(y + n * self.part(step.named, layer, branch, "b") * before(y, self.rows))

    def mix_out_backward(self, step, layer, branch, n, y, dout, dy):
        b, y_before = self.part(step.named, layer, branch, "b"), before(y, self.rows)
        dy.copy_(dout + behind(dout * n * b, self.rows))
        self.part(step.named_grads, layer, branch, "b").add_((dout * n * y_before).sum(0))
        self.dn[layer, branch] = dout * b * y_before

    def mix_in_backward(self, step, layer, branch, n, dx, dn):
        a = self.part(step.named, layer, branch, "a")
        self.part(step.named_grads, layer, branch, "a").add_((dx * before(n, self.rows)).sum(0))
        dn.copy_(dx + behind(a * dx, self.rows) + self.dn.pop((layer, branch)))


def mixed(lengths=(19, 1, 2, 7, 23), **changes):
    """A pack whose draft mixes with weights that are not alike."""
    case = small_dflash(lengths, **changes)
    config = MixedConfig(**case.config.model_dump())
    draft = MixedDraft(config)
    draft.load_state_dict(case.draft.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(5)
    for p in draft.mix.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.4
    draft = draft.double()
    draft.take_from_target(case.draft.embedding)
    case.draft, case.config = draft, config
    return case


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("labels", ["fill_in", "shifted"])
@pytest.mark.parametrize("chunk_blocks", [1, 3, 100])
def test_the_engine_with_a_mixer_is_the_reference(layers, labels, chunk_blocks):
    case = mixed(num_hidden_layers=layers, labels=labels)
    anchors = draw_anchors(case.batch, 8, seed=3, step=1)
    args = case.draft, case.batch, case.features, case.head, anchors, BlockLoss()
    rows, grads = block_ref_step(*args)
    ours, found = block_engine_step(*args, chunk_blocks=chunk_blocks, mixer=RowMixer(case.draft))
    torch.testing.assert_close(ours.loss, rows.loss, rtol=1e-11, atol=1e-11)
    assert any(name.startswith("mix.") for name in grads)
    for name, grad in grads.items():
        error = float((found[name] - grad).abs().max() / grad.abs().max())
        assert error < 1e-11, f"{name}: {error:.1e}"


def test_a_drafter_mixes_as_it_was_trained():
    case = mixed(lengths=(23,))
    drafter = One(BlockDrafter(case.draft, case.head, 1, 30))
    with torch.no_grad():
        drafter.extend(case.features.g[:9])
        states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([9]))[0]
        torch.testing.assert_close(drafter.block(case.batch.input_ids[9:10]), states, rtol=1e-11, atol=1e-11)


def test_what_mixing_takes_is_listed():
    case = mixed()
    anchors = draw_anchors(case.batch, 8, seed=3, step=1)
    engine = BlockEngine(case.draft, case.head, BlockLoss(), lambda *_: anchors, 4, mixer=RowMixer(case.draft))
    engine.step(case.batch, case.features, flat_gradients(case.draft.trainable()))
    listed = memory.chunk_buffers(case.config, 4, torch.float64, torch.float64, "cpu", False)
    assert {name for name in engine.take.held if not name.startswith("context") and name != "c0"} <= listed.keys()
    assert {"0.attention.x", "1.mlp.y", "dmix"} <= engine.take.held.keys()


def test_a_shape_that_mixes_needs_a_mixer_and_no_other_has_one():
    case = mixed()
    with pytest.raises(AssertionError, match="whether the method has a mixer"):
        BlockEngine(case.draft, case.head, BlockLoss(), lambda *_: None)
