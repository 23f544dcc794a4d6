"""DFlash2's golden case: reference and engine agree with an independent trainer, and any one fault of what is new shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_blocks import in_float64

from fastdraft.kernels import selector
from fastdraft.model.dflash.engine import block_engine_step
from fastdraft.model.dflash.golden import worst_block_errors
from fastdraft.model.dflash.ref import LiveRows, block_ref_step
from fastdraft.model.dflash2 import draft as drafts
from fastdraft.model.dflash2 import ref
from fastdraft.model.dflash2.golden import load_selector_golden
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.ref import selector_losses_ref

FILE = Path(__file__).parents[2] / "golden_methods" / "dflash2.safetensors"


def load():
    return in_float64(load_selector_golden(FILE))


def reference(*args):
    return block_ref_step(*args, row_losses=selector_losses_ref)


def engine(*args):
    return block_engine_step(*args, chunk_blocks=4, head_type=SelectorHead, mixer=ConvolutionMixer(args[0]))


def test_the_reference_is_the_trainers_to_1e_9():
    case = load()
    errors = worst_block_errors(case, reference)
    assert {f"grad {parameter}" for parameter in case.draft.trainable()} < errors.keys()
    assert max(errors.values()) < 1e-9


def test_the_engine_is_too_up_to_the_frequencies_float32():
    case = load_selector_golden(FILE)
    assert max(worst_block_errors(case, engine).values()) < 1e-6
    assert max(worst_block_errors(case.inputs("cpu", torch.float32), engine).values()) < 1e-4


# --- planted faults: each must be seen by more than a thousand times the tolerance ------------------------------------


def convolution_over_the_border(monkeypatch, case):
    plain = drafts.block_conv_ref
    anywhere = lambda x, delta, base, slot: plain(x, delta, base, torch.arange(len(x)))  # noqa: E731
    monkeypatch.setattr(drafts, "block_conv_ref", anywhere)
    return case


def sides_swapped(monkeypatch, case):
    for layer in case.draft.layers:
        layer.attention_conv.base_kernel.data = layer.attention_conv.base_kernel.data.flip(0)
    return case


def taps_before_sides(monkeypatch, case):
    def coefficients(self, n):
        return self.kernel_projection(n).unflatten(-1, (self.base_kernel.shape[1], 2, -1)).transpose(1, 2)

    monkeypatch.setattr(drafts._Convolution, "coefficients", coefficients)
    return case


def groups_interleaved(monkeypatch, case):
    of = drafts._Convolution.coefficients
    monkeypatch.setattr(drafts._Convolution, "coefficients", lambda self, n: of(self, n).flip(-1))
    return case


def label_as_predecessor(monkeypatch, case):
    losses = selector_losses_ref
    changed = lambda draft, rows, *rest: losses(draft, LiveRows(*rows)._replace(previous=rows.label), *rest)  # noqa: E731
    monkeypatch.setitem(globals(), "selector_losses_ref", changed)
    return case


def no_label_among_candidates(monkeypatch, case):
    """The weakest candidate stays, and the label is one more."""
    monkeypatch.setattr(
        selector, "_trained", lambda inside, k: torch.cat([inside[:, None] | True] * k + [~inside[:, None]], 1)
    )
    return case


def selector_without_weight(monkeypatch, case):
    return replace(case, loss=replace(case.loss, selector_alpha=0.5))


def logits_without_gradient(monkeypatch, case):
    plain = ref.candidates_ref
    monkeypatch.setattr(ref, "candidates_ref", lambda z, *rest: plain(z.detach(), *rest))
    return case


FAULTS = [
    *(convolution_over_the_border, sides_swapped, taps_before_sides, groups_interleaved, label_as_predecessor),
    *(no_label_among_candidates, selector_without_weight, logits_without_gradient),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault, monkeypatch):
    case = fault(monkeypatch, load())
    assert max(worst_block_errors(case, reference).values()) > 1e-3


def test_a_case_of_another_method_is_refused():
    with pytest.raises(ValueError, match=r"dflash_plain.safetensors is a golden case of dflash, not of dflash2"):
        load_selector_golden(FILE.with_name("dflash_plain.safetensors"))
