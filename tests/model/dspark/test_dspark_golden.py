"""DSpark's golden cases: reference and engine agree with independent trainers, and any one classical fault shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_blocks import in_float64

from fastdraft.batch import Batch
from fastdraft.model.dflash import ref
from fastdraft.model.dflash.golden import load_block_golden, worst_block_errors
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.golden import load_dspark_golden
from fastdraft.model.dspark.head import dspark_engine_step
from fastdraft.model.dspark.ref import dspark_ref_step

FOLDER = Path(__file__).parents[2] / "golden_methods"
CASES = sorted(path.stem for path in FOLDER.glob("dspark_*.safetensors"))


def load(name):
    return load_dspark_golden(FOLDER / f"{name}.safetensors")


def test_two_cases_are_here():
    assert CASES == ["dspark_packed", "dspark_plain"]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_trainers_to_1e_12(name):
    errors = worst_block_errors(in_float64(load(name)), dspark_ref_step)
    assert {"row_loss", "live", "acceptance", "grad markov_head.markov_w1.weight"} < errors.keys()
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("chunk_blocks", [1, 3, 100])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_too_up_to_the_frequencies_float32(name, chunk_blocks):
    case = load(name)
    run = lambda *args: dspark_engine_step(*args, chunk_blocks=chunk_blocks)  # noqa: E731
    errors = worst_block_errors(case, run)
    assert {f"grad {parameter}" for parameter in case.draft.trainable()} < errors.keys()
    assert max(errors.values()) < 1e-7
    assert max(worst_block_errors(case.inputs("cpu", torch.float32), run).values()) < 1e-4


# --- planted faults: each must be seen by more than a thousand times the tolerance ------------------------------------


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


def causal(monkeypatch, case):
    attention = ref.attend_in_blocks
    monkeypatch.setattr(ref, "attend_in_blocks", lambda *args: attention(*args[:-1], 10**6))
    return case


def half_l1(_monkeypatch, case):
    """Total variation is half of L1."""
    return replace(case, loss=replace(case.loss, l1_weight=case.loss.l1_weight / 2))


def other_gamma(_monkeypatch, case):
    return replace(case, loss=replace(case.loss, gamma=7.0))


def one_document(_monkeypatch, case):
    return replace(case, batch=Batch(case.batch.input_ids, case.batch.loss_mask, (case.batch.num_tokens,)))


FAULTS = [fill_in, one_late, detached, causal, half_l1, other_gamma, one_document]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault, monkeypatch):
    case = fault(monkeypatch, load("dspark_packed"))
    assert max(worst_block_errors(case, dspark_ref_step).values()) > 1e-2


def test_rows_behind_a_hole_in_the_mask_show(monkeypatch):
    """In one of the cases a block has a live label behind one that is not."""
    errors = [max(worst_block_errors(without_prefix(monkeypatch, load(name)), dspark_ref_step).values()) for name in CASES]
    assert max(errors) > 1e-2


def test_a_case_of_another_method_is_named():
    with pytest.raises(ValueError, match=r"dflash_plain.safetensors is a golden case of dflash, not of dspark"):
        load_dspark_golden(FOLDER / "dflash_plain.safetensors")
    with pytest.raises(ValueError, match=r"is a golden case of dspark, not of dflash"):
        load_block_golden(FOLDER / "dspark_plain.safetensors")
