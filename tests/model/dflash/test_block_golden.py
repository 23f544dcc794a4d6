"""Golden cases of the methods of blocks: reference and engine agree with independent trainers, and any one classical fault
shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_blocks import in_float64

from fastdraft.batch import Batch
from fastdraft.kernels import selector
from fastdraft.model.dflash import ref
from fastdraft.model.dflash.blocks import plan_blocks
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import block_engine_step
from fastdraft.model.dflash.golden import load_block_golden, worst_block_errors
from fastdraft.model.dflash.ref import LiveRows, block_ref_step, block_rows_ref
from fastdraft.model.dflash2 import draft as drafts
from fastdraft.model.dflash2 import ref as selector_ref
from fastdraft.model.dflash2.golden import load_selector_golden
from fastdraft.model.dflash2.head import selector_engine_step
from fastdraft.model.dflash2.ref import selector_losses_ref
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.golden import load_dspark_golden
from fastdraft.model.dspark.head import dspark_engine_step
from fastdraft.model.dspark.ref import dspark_ref_step

FOLDER = Path(__file__).parents[2] / "golden_methods"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def selector_ref_step(*args):
    """Of whatever `selector_losses_ref` is here: a fault changes it."""
    return block_ref_step(*args, row_losses=selector_losses_ref)


# Of each method: how a case is read, both steps, and how near they are to the trainers, in float64.
METHODS = {
    "dflash": (load_block_golden, block_ref_step, block_engine_step, 1e-9, 1e-6),
    "dflash2": (load_selector_golden, selector_ref_step, selector_engine_step, 1e-9, 1e-6),
    "dspark": (load_dspark_golden, dspark_ref_step, dspark_engine_step, 1e-12, 1e-7),
}


def method_of(name):
    return METHODS[name.split("_")[0]]


def load(name):
    return method_of(name)[0](FOLDER / f"{name}.safetensors")


def test_all_cases_are_here():
    blocks = ["dflash_dpace", "dflash_packed", "dflash_plain", "dflash_sliding"]
    assert ["dflash2", *blocks, "dspark_packed", "dspark_plain"] == CASES


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_trainers(name):
    _, reference, _, tolerance, _ = method_of(name)
    case = in_float64(load(name))
    errors = worst_block_errors(case, reference)
    assert {"row_loss", "live", *(f"grad {parameter}" for parameter in case.draft.trainable())} <= errors.keys()
    assert ("acceptance" in errors) or not name.startswith("dspark")
    assert max(errors.values()) < tolerance
    if name.startswith("dflash_"):
        rows, _ = block_rows_ref(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
        torch.testing.assert_close(rows.acceptance[:, case.anchors].T, case.row_acceptance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_blocks", [1, 3, 4, 100])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_too_up_to_the_frequencies_float32(name, chunk_blocks):
    _, _, engine, _, tolerance = method_of(name)
    case = load(name)
    run = lambda *args: engine(*args, chunk_blocks=chunk_blocks)  # noqa: E731
    errors = worst_block_errors(case, run)
    assert {f"grad {parameter}" for parameter in case.draft.trainable()} < errors.keys()
    assert max(errors.values()) < tolerance
    assert max(worst_block_errors(case.inputs("cpu", torch.float32), run).values()) < 1e-4


# --- planted faults: each must be seen by more than a thousand times the tolerance ------------------------------------


def causal_block(monkeypatch, case):
    attention = ref.attend_in_blocks
    monkeypatch.setattr(ref, "attend_in_blocks", lambda *args: attention(*args[:-1], 10**6))
    return case


def sees_its_own_anchor(monkeypatch, case):
    attention = ref.attend_in_blocks
    changed = lambda q, k, v, kb, vb, anchors, *rest: attention(q, k, v, kb, vb, anchors + 1, *rest)  # noqa: E731
    monkeypatch.setattr(ref, "attend_in_blocks", changed)
    return case


def labels_shifted(monkeypatch, case):
    return replace(case, draft=reshaped(case.draft, labels="shifted", block_size=case.draft.config.block_size - 1))


def mask_of_another_token(monkeypatch, case):
    return replace(case, draft=reshaped(case.draft, mask_token_id=(case.draft.config.mask_token_id + 1) % 90))


def documents_run_together(monkeypatch, case):
    return replace(case, batch=Batch(case.batch.input_ids, case.batch.loss_mask, (case.batch.num_tokens,)))


def no_norm_of_the_context(monkeypatch, case):
    monkeypatch.setattr(DFlashDraft, "context", lambda self, g: self.fc(g) * (1 + 0 * self.hidden_norm.weight))
    return case


def no_norm_of_the_heads(monkeypatch, case):
    for layer in case.draft.layers:
        layer.self_attn.k_norm.forward = lambda x, w=layer.self_attn.k_norm.weight: x * (1 + 0 * w)
    return case


def reshaped(draft: DFlashDraft, **changes) -> DFlashDraft:
    draft.config = DFlashConfig.model_validate(draft.config.model_dump() | changes)
    return draft


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
    plain = selector_ref.candidates_ref
    monkeypatch.setattr(selector_ref, "candidates_ref", lambda z, *rest: plain(z.detach(), *rest))
    return case


def without_prefix(monkeypatch, case):
    """Rows behind the first that has no label are trained on too."""
    monkeypatch.setattr(type(case.draft.config), "live_prefix", False)
    return case


def fill_in(monkeypatch, case):
    """The labels of DFlash: the token at a slot's own place."""
    steps = ref.live_steps

    def shifted_back(batch, anchors, config):
        at, live = steps(batch, anchors, config)
        return (at - 1).clamp_min(1), live

    monkeypatch.setattr(ref, "live_steps", shifted_back)
    return case


def one_late(monkeypatch, case):
    """The Markov head reads the label and not the token before it."""
    logits = DSparkDraft.logits
    ids = case.batch.input_ids
    follows = torch.zeros(case.draft.config.vocab_size, dtype=torch.int64).index_copy_(0, ids[:-1], ids[1:])
    monkeypatch.setattr(DSparkDraft, "logits", lambda self, x, previous, head: logits(self, x, follows[previous], head))
    return case


def detached(monkeypatch, case):
    """The confidence head's loss does not reach the states."""
    confidence = DSparkDraft.confidence
    monkeypatch.setattr(DSparkDraft, "confidence", lambda self, x, previous: confidence(self, x.detach(), previous))
    return case


def half_l1(_monkeypatch, case):
    """Total variation is half of L1."""
    return replace(case, loss=replace(case.loss, l1_weight=case.loss.l1_weight / 2))


def other_gamma(_monkeypatch, case):
    return replace(case, loss=replace(case.loss, gamma=7.0))


FAULTS = {  # by the case that shows them
    "dflash_plain": [
        *(causal_block, sees_its_own_anchor, mask_of_another_token, documents_run_together),
        *(no_norm_of_the_context, no_norm_of_the_heads),
    ],
    "dflash2": [
        *(convolution_over_the_border, sides_swapped, taps_before_sides, groups_interleaved, label_as_predecessor),
        *(no_label_among_candidates, selector_without_weight, logits_without_gradient),
    ],
    "dspark_packed": [fill_in, one_late, detached, causal_block, half_l1, other_gamma, documents_run_together],
}


@pytest.mark.parametrize("name, fault", [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_fault_shows(name, fault, monkeypatch):
    case = load(name)
    case = fault(monkeypatch, in_float64(case) if name == "dflash2" else case)
    least = 1e-2 if name.startswith("dspark") else 1e-3
    assert max(worst_block_errors(case, method_of(name)[1]).values()) > least


def test_shifted_labels_are_other_slots(monkeypatch):
    case = load("dflash_plain")
    want, _ = block_ref_step(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    case = labels_shifted(monkeypatch, case)
    rows, _ = block_ref_step(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    assert torch.equal(rows.live, want.live) and float((rows.loss - want.loss).abs().max()) > 1e-2


def test_a_window_from_the_anchor_shows():
    """One peer counts the window from the anchor; engines and this trainer count it from the row."""
    case = load("dflash_sliding")
    narrow = reshaped(case.draft, sliding_window=case.draft.config.sliding_window - 1)
    assert max(worst_block_errors(replace(case, draft=narrow), block_ref_step).values()) > 1e-3


def test_rows_behind_a_hole_in_the_mask_show(monkeypatch):
    """In one of the cases a block has a live label behind one that is not."""
    errors = [
        max(worst_block_errors(without_prefix(monkeypatch, load(name)), dspark_ref_step).values())
        for name in ("dspark_packed", "dspark_plain")
    ]
    assert max(errors) > 1e-2


def test_a_file_that_is_no_case_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.safetensors is not a readable golden case"):
        load_block_golden(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "method, file", [("dspark", "dflash_plain"), ("dflash2", "dflash_plain"), ("dflash", "dspark_plain")]
)
def test_a_case_of_another_method_is_named(method, file):
    with pytest.raises(ValueError, match=rf"{file}.safetensors is a golden case of {file.split('_')[0]}, not of {method}"):
        METHODS[method][0](FOLDER / f"{file}.safetensors")


def test_the_plan_has_the_cases_rows():
    case = load("dflash_packed")
    (chunk,) = plan_blocks(case.batch, case.anchors, case.draft.config, 100, 10**6)
    live = torch.zeros_like(case.live)
    live[chunk.head_block, chunk.head_step] = True
    assert torch.equal(live, case.live) and len(chunk.parts) == 1
