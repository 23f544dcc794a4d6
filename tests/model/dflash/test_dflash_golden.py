"""DFlash's golden cases: reference and engine agree with independent trainers, and any one classical fault shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_blocks import in_float64

from fastdraft.batch import Batch
from fastdraft.model.dflash import ref
from fastdraft.model.dflash.blocks import plan_blocks
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import block_engine_step
from fastdraft.model.dflash.golden import load_block_golden, worst_block_errors
from fastdraft.model.dflash.ref import block_ref_step, block_rows_ref

FOLDER = Path(__file__).parents[2] / "golden_methods"
CASES = sorted(path.stem for path in FOLDER.glob("dflash_*.safetensors"))


def load(name):
    return load_block_golden(FOLDER / f"{name}.safetensors")


def test_four_cases_are_here():
    assert CASES == ["dflash_dpace", "dflash_packed", "dflash_plain", "dflash_sliding"]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_trainers_to_1e_9(name):
    case = in_float64(load(name))
    assert max(worst_block_errors(case, block_ref_step).values()) < 1e-9
    rows, _ = block_rows_ref(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    torch.testing.assert_close(rows.acceptance[:, case.anchors].T, case.row_acceptance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_too_up_to_the_frequencies_float32(name):
    case = load(name)
    errors = worst_block_errors(case, block_engine_step)
    assert {f"grad {parameter}" for parameter in case.draft.trainable()} < errors.keys()
    assert max(errors.values()) < 1e-6
    in_fp32 = worst_block_errors(case.inputs("cpu", torch.float32), block_engine_step)
    assert max(in_fp32.values()) < 1e-4


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


FAULTS = [
    *(causal_block, sees_its_own_anchor, mask_of_another_token, documents_run_together),
    *(no_norm_of_the_context, no_norm_of_the_heads),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault, monkeypatch):
    case = fault(monkeypatch, load("dflash_plain"))
    assert max(worst_block_errors(case, block_ref_step).values()) > 1e-3


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


def test_a_file_that_is_no_case_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.safetensors is not a readable golden case"):
        load_block_golden(tmp_path / "x.safetensors")


def test_the_plan_has_the_cases_rows():
    case = load("dflash_packed")
    (chunk,) = plan_blocks(case.batch, case.anchors, case.draft.config, 100, 10**6)
    live = torch.zeros_like(case.live)
    live[chunk.head_block, chunk.head_step] = True
    assert torch.equal(live, case.live) and len(chunk.parts) == 1
