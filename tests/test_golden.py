"""The golden cases: the reference agrees in float64 to 1e-5, and an engine with any one classical fault does not."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdraft import check
from fastdraft.check import check_golden, prove_kernels
from fastdraft.kernels import chain_qkv
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.eagle3 import engine as ttt
from fastdraft.model.eagle3 import ref as reference
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.golden import load_golden, worst_errors
from fastdraft.model.eagle3.ref import ttt_ref_step

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-5


def test_four_cases_are_here():
    assert CASES == ["gqa_full", "lk_alpha", "norm_output", "padded_t7"]


def exact_case():
    """The case that was computed in float64 throughout, frequencies too; ours are float32's."""
    case = load_golden(FOLDER / "norm_output.safetensors")
    rope, dim = case.draft.config.rope_parameters, case.draft.config.head_dim
    case.draft.rope.freqs = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return case


def test_the_fed_back_norm_is_exact(monkeypatch):
    # The fused engine's check of the frequencies' dtype is set aside.
    check = chain_qkv.check
    monkeypatch.setattr(chain_qkv, "check", lambda name, *args, **more: name == "freqs" or check(name, *args, **more))
    for run_step in (ttt_ref_step, lambda *args: ttt.ttt_engine_step(*args, chunk_rows=3), ttt.ttt_engine_step):
        errors = worst_errors(exact_case(), run_step)
        assert max(errors.values()) < 1e-12, errors


def test_check_names_the_worst():
    found = check_golden(FOLDER, "reference")
    for name in CASES:
        ours = [(quantity, error, allowed) for case, quantity, error, allowed in found if case == f"{name} cpu fp64"]
        assert [quantity for quantity, _, _ in ours[:-1]] == ["step_loss", "acceptance", "hits", "masked_in"]
        golden = load_golden(FOLDER / f"{name}.safetensors")
        errors = worst_errors(golden, ttt_ref_step)
        assert {f"grad {parameter}" for parameter in golden.draft.trainable()} < errors.keys()
        worst = max(error for quantity, error in errors.items() if quantity.startswith("grad "))
        assert ours[-1][0].startswith("grad ") and ours[-1][1] == worst > 0
        assert all(error <= TOLERANCE == allowed for _, error, allowed in ours)


def test_check_refuses():
    with pytest.raises(ValueError, match="'fast' is not one of reference"):
        check_golden(FOLDER, "fast")
    with pytest.raises(ValueError, match="holds no golden cases"):
        check_golden(FOLDER / "nowhere", "reference")


@contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def positions_stay(case, *args):
    """Every step rotated at pos, not pos + i."""
    qkv, start = Draft.qkv, case[1].positions
    with patched(Draft, "qkv", lambda self, ids, h, p: qkv(self, ids, h, start)):
        return ttt_ref_step(*case, *args)


def positions_from_one(case, *args):
    """RoPE position pos + i + 1 at steps after the first. (A shift of all steps alike would change nothing.)"""
    qkv, start = Draft.qkv, case[1].positions
    with patched(Draft, "qkv", lambda self, ids, h, p: qkv(self, ids, h, p + (not torch.equal(p, start)))):
        return ttt_ref_step(*case, *args)


def recurrence_is_normed(case, *args):
    finish = Draft.finish
    with patched(Draft, "finish", lambda self, h, a: self.norm(finish(self, h, a))):
        return ttt_ref_step(*case, *args)


def recurrence_is_the_other(case, *args):
    draft = copy.deepcopy(case[0])
    draft.config = draft.config.model_copy(update={"norm_output": not draft.config.norm_output})
    return ttt_ref_step(draft, *case[1:], *args)


def mask_is_shifted(case, *args):
    draft, batch, *rest = case
    return ttt_ref_step(draft, replace(batch, loss_mask=batch.loss_mask.roll(-1)), *rest, *args)


def teacher_is_shifted(case, *args):
    draft, batch, features, *rest = case
    return ttt_ref_step(draft, batch, replace(features, f=features.f.roll(1, 0)), *rest, *args)


def tokens_are_shifted(case, *args):
    draft, batch, *rest = case
    return ttt_ref_step(draft, replace(batch, input_ids=batch.input_ids.roll(1)), *rest, *args)


def documents_see_each_other(case, *args):
    draft, batch, *rest = case
    attention = reference.attention_ref
    with patched(reference, "attention_ref", lambda q, k, v, lengths: attention(q, k, v, (sum(lengths),))):
        return ttt_ref_step(draft, batch, *rest, *args)


def own_keys_are_dropped(case, *args):
    attention = reference.attention_ref
    with patched(reference, "attention_ref", lambda q, k, v, lengths: attention(q, k[:1], v[:1], lengths)):
        return ttt_ref_step(*case, *args)


def teacher_is_renormalised(case, *args):
    """Acceptance, and LK losses, against P restricted to the draft vocabulary."""

    def restricted(*args):
        teacher = teacher_ref(*args)
        return teacher._replace(lse_full=teacher.lse_draft)

    with patched(reference, "teacher_ref", restricted):
        return ttt_ref_step(*case, *args)


def offset_is_an_id(case, *args):
    """d2t read as the target id itself."""
    with patched(Draft, "draft_ids", property(lambda self: self.d2t)):
        return ttt_ref_step(*case, *args)


def one_gradient_is_a_little_off(case, *args):
    rows, grads = ttt_ref_step(*case, *args)
    return rows, grads | {"midlayer.hidden_norm.weight": grads["midlayer.hidden_norm.weight"] * 1.0001}


FAULTS = [
    positions_stay,
    positions_from_one,
    recurrence_is_normed,
    recurrence_is_the_other,
    mask_is_shifted,
    teacher_is_shifted,
    tokens_are_shifted,
    documents_see_each_other,
    own_keys_are_dropped,
    teacher_is_renormalised,
    offset_is_an_id,
    one_gradient_is_a_little_off,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault):
    def run_step(draft, batch, features, head, step_weights, kind):
        return fault((draft, batch, features, head), step_weights, kind)

    worst = [max(worst_errors(load_golden(FOLDER / f"{name}.safetensors"), run_step).values()) for name in CASES]
    assert max(worst) > 3 * TOLERANCE, worst


def test_nan_and_missing_gradients_are_found():
    case = load_golden(FOLDER / f"{CASES[0]}.safetensors")

    def with_nan(*args):
        rows, grads = ttt_ref_step(*args)
        return rows, grads | {"fc.weight": grads["fc.weight"] * torch.nan}

    def without_one(*args):
        rows, grads = ttt_ref_step(*args)
        return rows, {name: grad for name, grad in grads.items() if name != "norm.weight"}

    assert worst_errors(case, with_nan)["grad fc.weight"] == float("inf")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        worst_errors(case, without_one)


def test_another_file_is_no_case(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a readable golden case"):
        load_golden(tmp_path / "other.safetensors")
    whole = (FOLDER / f"{CASES[0]}.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable golden case"):
        load_golden(tmp_path / "cut.safetensors")


def test_files_are_float64():
    tensors = load_file(FOLDER / f"{CASES[0]}.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.startswith(("weights.", "grads."))} == {torch.float64}


def test_the_proof_of_the_kernels_passes_and_can_fail(monkeypatch):
    """On the CPU the engine's plain-torch kernels; one that is off by 2 % is WRONG."""
    small = dict(tokens=96, hidden=64, vocab=400)
    monkeypatch.setattr(check, "PROVED", {"small": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)})
    rows = prove_kernels("cpu", **small)
    assert len(rows) == 3 * 4 and all(error <= allowed for *_, error, allowed in rows), rows
    rms_norm = ttt.rms_norm_backward
    monkeypatch.setattr(ttt, "rms_norm_backward", lambda dy, *args, **options: rms_norm(1.05 * dy, *args, **options))
    assert any(error > allowed for *_, error, allowed in prove_kernels("cpu", **small))
