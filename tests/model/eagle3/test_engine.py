"""The TTT engine against the reference step and the golden cases, and its memory.

Memory and tensor sizes are read on meta tensors of a real draft's shape, with the CPU backends of the kernels replaced by
nothing: the attention reference holds [M, Hq, N] scores and the loss reference several [n, Vd], which the CUDA kernels do
not. That no work is done for nothing is tests/test_step_cost.py's.

# N packed tokens, T TTT steps, H hidden, V target vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_step import meta_step
from tiny import draft_shape, noisy_draft

from bench.work import SHAPES
from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.config import Config, parse_config
from fastdraft.kernels import matmul
from fastdraft.model.buffers import flat_gradients, table_bytes
from fastdraft.model.eagle3 import METHOD
from fastdraft.model.eagle3 import engine as ttt
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine, ttt_engine_step
from fastdraft.model.eagle3.golden import load_golden, worst_errors
from fastdraft.model.eagle3.memory import chunk_buffers, fitting_chunk_rows, pack_buffers
from fastdraft.model.eagle3.ref import ttt_ref_step

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("*.safetensors"))
V, HT = 31, 12  # of `draft_shape`
DRAFTS = {
    "mha": {},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "fc_norm": {"fc_norm": True, "num_key_value_heads": 1},
    "norm_output": {"norm_output": True, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "norm_output, fc_norm": {"norm_output": True, "fc_norm": True, "hidden_size": 20, "head_dim": 8},
    "norm_output, norm_before_fc": {"norm_output": True, "norm_before_fc": True, "num_key_value_heads": 1},
    "wider": {"hidden_size": 20, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "head_dim": 8},
    "full_vocabulary": {"draft_vocab_size": V},
}
LENGTHS = (23, 1, 9, 2, 17, 3, 12)


def make_draft(dtype=torch.float64, **changes) -> Draft:
    return noisy_draft(draft_shape(**changes)).to(dtype)


def patchy_mask(lengths, generator) -> torch.Tensor:  # [N] bool
    """By turns: a long prompt, one trained token at the document's end, every token, random runs, one in the middle."""
    masks = []
    for d, n in enumerate(lengths):
        mask = torch.zeros(n, dtype=torch.bool)
        match d % 5:
            case 0:
                mask[2 * n // 3 :] = True
            case 1:
                mask[-1] = True
            case 2:
                mask[:] = True
            case 3:
                mask = (torch.rand(n, generator=generator) < 0.4).repeat_interleave(2)[:n]
            case 4:
                mask[n // 2] = True
        masks.append(mask)
    return torch.cat(masks)


def make_inputs(lengths=LENGTHS, seed=2, dtype=torch.float64, vocab=V, width=HT):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    batch = Batch(torch.randint(vocab, (n,), generator=generator), patchy_mask(lengths, generator), tuple(lengths))
    head = TargetHead(normal(vocab, width), bias=normal(vocab), scale=0.7, softcap=5.0)
    return batch, Features(normal(n, 3 * width), normal(n, width)), head


def decay(steps: int) -> torch.Tensor:
    return 0.8 ** torch.arange(steps, dtype=torch.float64)


def assert_same(ours, theirs, tolerance=1e-12):
    """Rows and gradients, relative to the largest element of each tensor; flags exactly."""
    (rows, grads), (law_rows, law_grads) = ours, theirs
    for name in ("hit", "live", "masked_in"):
        assert torch.equal(getattr(rows, name), getattr(law_rows, name)), name
    assert not rows.loss[~rows.live].any() and not rows.acceptance[~rows.live].any()
    pairs = {name: (getattr(rows, name), getattr(law_rows, name)) for name in ("loss", "acceptance")}
    assert grads.keys() == law_grads.keys()
    for name, (got, law) in (pairs | {name: (grads[name], law_grads[name]) for name in grads}).items():
        assert float((got - law).abs().max()) <= tolerance * max(float(law.abs().max()), 1e-3), name


def test_the_fed_back_norm_is_paid_for_where_it_is_trained_alone(monkeypatch):
    """Three passes more a step from the second on: forward, again for the backward, backward. No buffer of [R, H]."""
    passes = []
    for name in ("rms_norm", "rms_norm_backward"):
        kernel = getattr(ttt, name)
        monkeypatch.setattr(ttt, name, lambda *args, k=kernel, **more: (passes.append(k), k(*args, **more)))
    counts, sizes = [], []
    for fed in (False, True):
        passes.clear()
        draft, (batch, features, head) = make_draft(norm_output=fed), make_inputs()
        ttt_engine_step(draft, batch, features, head, decay(7), chunk_rows=4096)
        counts.append(len(passes))
        sizes.append(table_bytes(chunk_buffers(draft.config, 64, 7, torch.float32, torch.float32, "cuda")))
    assert counts[1] - counts[0] == 3 * 6
    assert sizes[1] - sizes[0] == 64 * (12 + 1) * 4


def test_a_norm_before_fc_wider_than_its_kernel_is_refused_before_the_first_step():
    with torch.device("meta"):
        draft = Draft(draft_shape(norm_before_fc=True, target_hidden_size=8192))
    config = parse_config({"target": {"path": "t"}, "data": {"paths": ["d"]}, "run_dir": "r"}, Config)
    with pytest.raises(ValueError, match="one norm of 24576 numbers, its kernel holds 16384; take fc_norm"):
        METHOD.build_step(config, draft, None, torch.device("cuda"))


# --- exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("chunk_rows", [5, 4096])
def test_golden(path, chunk_rows):
    errors = worst_errors(load_golden(path), lambda *args: ttt_engine_step(*args, chunk_rows=chunk_rows))
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
@pytest.mark.parametrize("shape", DRAFTS)
def test_equals_the_reference(shape, chunk_rows):
    draft, (batch, features, head) = make_draft(**DRAFTS[shape]), make_inputs()
    ours = ttt_engine_step(draft, batch, features, head, decay(7), chunk_rows=chunk_rows)
    theirs = ttt_ref_step(draft, batch, features, head, decay(7))
    assert theirs[0].live.any(1).all() and bool(theirs[0].masked_in.any(0).logical_not().any())
    assert shape == "full_vocabulary" or not torch.equal(theirs[0].live, theirs[0].masked_in)
    assert all(grad.any() for grad in theirs[1].values())
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_every_loss_and_length(kind, steps):
    draft, (batch, features, head) = make_draft(**DRAFTS["gqa"]), make_inputs()
    args = draft, batch, features, head, decay(steps), kind, 0.9, 2.0
    assert_same(ttt_engine_step(*args, chunk_rows=13), ttt_ref_step(*args))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    density=st.sampled_from([0.05, 0.3, 0.9]),
    steps=st.integers(1, 12),
    chunk_rows=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference_on_random_packs(lengths, density, steps, chunk_rows, seed):
    draft, (batch, features, head) = make_draft(), make_inputs(lengths, seed)
    mask = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(seed)) < density
    args = draft, replace(batch, loss_mask=mask), features, head, decay(steps)
    assert_same(ttt_engine_step(*args, chunk_rows=chunk_rows), ttt_ref_step(*args))


def test_acceptance_that_underflows_has_no_gradient():
    """A student sure of what the target excludes: alpha is 0, its logarithm clamped, and nothing is NaN."""
    draft, (batch, features, head) = make_draft(), make_inputs()
    draft.lm_head.weight.data *= 3000.0
    args = draft, batch, features, replace(head, scale=200.0, softcap=None), decay(3), "lk_alpha"
    rows, grads = ttt_engine_step(*args)
    law_rows, law_grads = ttt_ref_step(*args)
    assert (law_rows.acceptance[law_rows.live] == 0).any()
    torch.testing.assert_close(rows.loss, law_rows.loss, rtol=1e-9, atol=0)
    for name, law in law_grads.items():
        assert float((grads[name] - law).abs().max()) <= 1e-9 * float(law.abs().max()), name


@pytest.mark.parametrize("lengths", [(6, 4), (1, 2, 1)])
def test_nothing_trained_gives_nothing(lengths):
    """All masked, or all trained in documents too short to have a row."""
    draft, (batch, features, head) = make_draft(), make_inputs(lengths)
    batch = replace(batch, loss_mask=torch.full_like(batch.loss_mask, max(lengths) < 3))
    grads = flat_gradients(draft.trainable())
    for grad in grads.values():
        grad.fill_(3.0)
    rows = TTTEngine(draft, head, decay(4)).step(batch, features, grads)
    assert rows.loss.shape == (4, sum(lengths)) and not rows.sums().any()
    assert all((g == 3.0).all() for g in grads.values())


def test_gradients_add_up():
    draft, (batch, features, head) = make_draft(**DRAFTS["fc_norm"]), make_inputs()
    other_batch, other_features, _ = make_inputs((5, 11), seed=8)
    engine, grads = TTTEngine(draft, head, decay(4), chunk_rows=9), flat_gradients(draft.trainable())
    engine.step(batch, features, grads)
    engine.step(other_batch, other_features, grads)
    first = ttt_ref_step(draft, batch, features, head, decay(4))[1]
    second = ttt_ref_step(draft, other_batch, other_features, head, decay(4))[1]
    for name, grad in grads.items():
        law = first[name] + second[name]
        assert float((grad - law).abs().max()) <= 1e-12 * float(law.abs().max()), name


@pytest.mark.parametrize("kind", ["kl", "lk_lambda"])
def test_rows_are_those_of_the_step(kind):
    draft, (batch, features, head) = make_draft(**DRAFTS["gqa"]), make_inputs()
    engine = TTTEngine(draft, head, decay(5), kind, chunk_rows=9)
    step, rows = engine.step(batch, features, flat_gradients(draft.trainable())), engine.rows(batch, features)
    for name in ("loss", "acceptance", "hit", "live", "masked_in"):
        assert torch.equal(getattr(step, name), getattr(rows, name)), name


def test_the_draft_and_its_input_stay_as_they_are():
    draft, (batch, features, head) = make_draft(**DRAFTS["fc_norm"]), make_inputs()
    held = [*draft.state_dict().values(), features.g, features.f, head.weight, batch.input_ids, batch.loss_mask]
    before = [x.clone() for x in held]
    TTTEngine(draft, head, decay(5), chunk_rows=9).step(batch, features, flat_gradients(draft.trainable()))
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
    assert all(p.grad is None for p in draft.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
def test_precision(dtype, kind):
    """Three ways: truth is the reference in float64 on the rounded inputs, plain the reference in the dtype."""
    shape = dict(hidden_size=64, target_hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    draft = make_draft(**shape, vocab_size=151, draft_vocab_size=80).to(dtype)
    for p in draft.parameters():
        p.data = p.data * (0.3 if p.ndim > 1 else 1.0)
    batch, features, head = make_inputs((40, 3, 25, 31), seed=3, dtype=dtype, vocab=151, width=64)
    chosen = torch.randint(151, (batch.num_tokens,), generator=torch.Generator().manual_seed(4))
    features = replace(features, f=head.weight[chosen] / 10 + features.f / 10)  # the target's choices are no near-ties
    args = batch, features, head, decay(4), kind
    ours, plain = ttt_engine_step(draft, *args, chunk_rows=32), ttt_ref_step(draft, *args)
    exact = Features(features.g.double(), features.f.double())
    exact_head = replace(head, weight=head.weight.double(), bias=head.bias.double())
    truth = ttt_ref_step(draft.double(), batch, exact, exact_head, *args[3:])
    assert all(grad.dtype == torch.float32 for grad in ours[1].values())
    for name in ("live", "masked_in"):
        assert torch.equal(getattr(ours[0], name), getattr(truth[0], name))
        assert torch.equal(getattr(plain[0], name), getattr(truth[0], name))
    found = {name: [getattr(rows, name) for rows, _ in (ours, plain, truth)] for name in ("loss", "acceptance")}
    found |= {name: [grads[name] for _, grads in (ours, plain, truth)] for name in truth[1]}
    for name, (got, rough, law) in found.items():
        worst, allowed = (float((x.double() - law).abs().max()) for x in (got, rough))
        ulp = torch.finfo(dtype).eps * float(law.abs().max())
        assert worst <= 2 * allowed + ulp, f"{name}: {worst} against {allowed} + {ulp}"


FP8_SHAPE = dict(hidden_size=128, target_hidden_size=128, intermediate_size=384, num_attention_heads=4, head_dim=32)


def fp8_case(**changes):
    """A fresh draft as `init` makes them, in bf16, and a target that knows its tokens."""
    shape = FP8_SHAPE | dict(num_key_value_heads=2, vocab_size=1024, draft_vocab_size=512) | changes
    draft = Draft(draft_shape(**shape))
    draft.init_weights(0.02, torch.Generator().manual_seed(1))
    draft.set_vocab(torch.arange(0, 1024, 1024 // shape["draft_vocab_size"])[: shape["draft_vocab_size"]])
    batch, features, head = make_inputs((90, 3, 41), seed=3, dtype=torch.bfloat16, vocab=1024, width=128)
    head = TargetHead(head.weight * 128**-0.5)
    chosen = draft.draft_ids[torch.randint(512, (batch.num_tokens,), generator=torch.Generator().manual_seed(4))]
    features = replace(features, f=15 * head.weight[chosen] + 2 * features.f)
    return draft.bfloat16(), batch, features, head, decay(7).float()


@pytest.mark.parametrize("norm_output", [False, True])
@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
def test_a_step_in_fp8_is_near_that_in_bf16(kind, norm_output):
    """Chunks of 48 chains and of all; a fresh draft: the better a draft fits, the less of its gradient is left to see."""
    case = fp8_case(norm_output=norm_output)
    rows, grads = ttt_engine_step(*case, kind)
    for chunk_rows in (48, None):
        fp8_rows, fp8_grads = ttt_engine_step(*case, kind, chunk_rows=chunk_rows, fp8=True)
        assert torch.equal(rows.live, fp8_rows.live) and bool(rows.live.any())
        assert not torch.equal(rows.loss, fp8_rows.loss)
        torch.testing.assert_close(fp8_rows.loss.sum(1), rows.loss.sum(1), rtol=2e-3, atol=0)
        assert float((fp8_rows.loss - rows.loss).abs().max()) < 0.1
        for name, grad in grads.items():
            cosine = torch.nn.functional.cosine_similarity(grad.flatten(), fp8_grads[name].flatten(), dim=0)
            assert float(cosine) > 0.99, f"{name}: {float(cosine)}"
            assert float(fp8_grads[name].norm() / grad.norm()) == pytest.approx(1, abs=0.05), name


def test_what_runs_at_every_step_is_in_fp8(monkeypatch):
    """Five products forward and five back a step and chunk, of a document all trained on; step 0 has no k, v of its own."""
    draft, _, features, head, _ = fp8_case()
    batch = Batch(torch.arange(20), torch.ones(20, dtype=torch.bool), (20,))
    found = []
    multiply = matmul.multiply

    def counted(x, rows, *to):
        found.append(tuple(rows.q.shape))
        multiply(x, rows, *to)

    monkeypatch.setattr(matmul, "multiply", counted)
    engine = TTTEngine(draft, head, decay(3).float(), chunk_rows=64, fp8=True)
    engine.step(batch, Features(features.g[:20], features.f[:20]), flat_gradients(draft.trainable()))
    h, e, width, inner, vocab = 128, 128, 256, 384, 512
    once = [(h, e), (2 * inner, h), (h, inner), (inner, h), (h, 2 * inner), (e, h)]  # o, gate and up, down, and back
    qkv = [(e, h), (h, e), *2 * [(width, h), (h, width)]]
    assert sorted(found) == sorted(3 * once + qkv + [(vocab, h), (h, vocab)])
    found.clear()
    engine.rows(batch, Features(features.g[:20], features.f[:20]))
    assert not found


def test_rows_are_never_in_fp8_and_nothing_of_it_stays():
    draft, batch, features, head, weights = fp8_case()
    before = [p.clone() for p in draft.parameters()]
    plain, engine = TTTEngine(draft, head, weights), TTTEngine(draft, head, weights, fp8=True)
    for _ in range(2):
        for name, rows in (("plain", plain.rows(batch, features)), ("fp8", engine.rows(batch, features))):
            assert torch.equal(rows.loss, plain.rows(batch, features).loss), name
        engine.step(batch, features, flat_gradients(draft.trainable()))
    assert all(torch.equal(now, then) for now, then in zip(draft.parameters(), before, strict=True))


def test_fp8_weights_follow_the_draft():
    draft, *case = fp8_case()
    engine = TTTEngine(draft, *case[2:], fp8=True)
    first = engine.step(*case[:2], flat_gradients(draft.trainable())).loss
    held = {name: x.data_ptr() for name, x in engine.take.held.items()}
    with torch.no_grad():
        draft.lm_head.weight.mul_(3)
    second = engine.step(*case[:2], flat_gradients(draft.trainable())).loss
    assert not torch.equal(first, second)
    assert torch.equal(
        second, TTTEngine(draft, *case[2:], fp8=True).step(*case[:2], flat_gradients(draft.trainable())).loss
    )
    assert {name: x.data_ptr() for name, x in engine.take.held.items()} == held


@pytest.mark.parametrize(("change", "width"), [({"intermediate_size": 392}, 392), ({"draft_vocab_size": 500}, 500)])
def test_fp8_wants_widths_in_sixteens(change, width):
    draft = make_draft(torch.bfloat16, **FP8_SHAPE | {"vocab_size": 1024, "draft_vocab_size": 512} | change)
    with pytest.raises(ValueError, match=rf"multiples of 16, the draft has {width}; use precision=bf16"):
        TTTEngine(draft, make_inputs(dtype=torch.bfloat16)[2], decay(3), fp8=True)


@pytest.mark.parametrize("wrong", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    draft, (batch, features, head) = make_draft(), make_inputs()
    ids = batch.input_ids.clone()
    ids[4] = wrong
    with pytest.raises(ValueError, match=rf"token ids .*{wrong}.* do not fit the draft's vocabulary of {V}"):
        TTTEngine(draft, head, decay(3)).step(replace(batch, input_ids=ids), features, flat_gradients(draft.trainable()))


@pytest.mark.parametrize(
    ("bad", "match"), [({"step_weights": decay(13)}, r"13 is not in 1\.\.12"), ({"chunk_rows": 0}, "chunk_rows is 0")]
)
def test_bad_settings_are_refused(bad, match):
    draft, (_, _, head) = make_draft(), make_inputs()
    with pytest.raises(ValueError, match=match):
        TTTEngine(draft, head, **{"step_weights": decay(3)} | bad)


# --- memory --------------------------------------------------------------------------------------------------------------

LLAMA_8B = SHAPES["llama-3.1-8b"]


def all_trained(*lengths: int) -> Batch:
    n = sum(lengths)
    return Batch(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), lengths)


@pytest.mark.parametrize("lengths", [(8192,), (2048,) * 4])
def test_nothing_over_a_vocabulary_or_all_steps_exists_for_the_pack(lengths):
    """A tensor with a row for every token is no wider than g; one over a vocabulary has a chunk's rows and no more."""
    c, n, steps, chunk_rows = LLAMA_8B, sum(lengths), 7, 512
    made = meta_step(c, all_trained(*lengths), steps, chunk_rows)
    head_rows = steps * chunk_rows
    assert (n, c.hidden_size) in made.shapes and (head_rows, c.draft_vocab_size) in made.shapes
    weights = {(c.vocab_size, c.hidden_size)}  # the target's head, its rows in another order
    assert weights <= made.shapes
    largest = max(torch.Size(shape).numel() for shape in made.shapes - weights)
    assert largest < min(n * c.vocab_size, n * c.draft_vocab_size, steps * n * c.hidden_size)
    for shape in made.shapes - weights:
        if shape and shape[0] >= n:
            wide = torch.Size(shape[1:]).numel()
            assert wide <= c.hidden_size and (shape[0] == n or wide == 1), shape
        if shape and shape[-1] in (c.draft_vocab_size, c.vocab_size):
            assert torch.Size(shape[:-1]).numel() <= max(head_rows, chunk_rows + steps), shape


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2), (torch.bfloat16, 12), (torch.float32, 7)])
def test_memory_grows_by_what_is_kept_for_a_token_alone(dtype, steps):
    """h^0, K^0, V^0 and their gradients, results, ids and positions: nothing else depends on the pack's length, and of
    these only the results (11 bytes a step) on the depth."""
    c = LLAMA_8B
    short, long = (meta_step(c, all_trained(n), steps, 512, dtype).peak for n in (4096, 12288))
    kv = 2 * c.num_key_value_heads * c.head_dim
    kept = 2 * c.hidden_size * dtype.itemsize + kv * (dtype.itemsize + 4) + steps * (2 * 4 + 3) + 2 * 8
    assert long - short == pytest.approx(8192 * kept, rel=0.02)


def test_memory_of_a_chunk_grows_with_its_rows():
    narrow, wide = (table_bytes(chunk_buffers(LLAMA_8B, m, 7, torch.bfloat16, torch.bfloat16, "cuda")) for m in (512, 1024))
    assert wide == pytest.approx(2 * narrow, rel=0.02)
    assert fitting_chunk_rows(LLAMA_8B, 7, torch.bfloat16, torch.bfloat16, "cuda", wide) == 1024
    assert fitting_chunk_rows(LLAMA_8B, 7, torch.bfloat16, torch.bfloat16, "cuda", wide - 1) == 512
    assert fitting_chunk_rows(LLAMA_8B, 7, torch.bfloat16, torch.bfloat16, "cuda", 1e6) == 0


def test_a_second_step_takes_no_buffer():
    draft, (batch, features, head) = make_draft(), make_inputs()
    engine, grads = TTTEngine(draft, head, decay(4), chunk_rows=9), flat_gradients(draft.trainable())
    engine.step(batch, features, grads)
    held = {name: x.data_ptr() for name, x in engine.take.held.items()}
    other, other_features, _ = make_inputs((31, 2, 8), seed=5)
    engine.step(other, other_features, grads)
    assert {name: x.data_ptr() for name, x in engine.take.held.items()} == held


def test_the_run_that_only_compiles_has_a_chunk_with_a_long_context(monkeypatch):
    """The last chunk may be of a short document: then it lacks what a chunk far into the long one launches."""
    draft, (_, features, head) = make_draft(), make_inputs((50, 12))
    seen = []
    monkeypatch.setattr(ttt.Step, "run_chunk", lambda self, chunk: seen.append(chunk.context))
    batch, engine = all_trained(50, 12), TTTEngine(draft, head, decay(4), chunk_rows=10)
    ttt.Step(engine, batch.num_tokens, features, flat_gradients(draft.trainable())).rehearse(batch)
    assert seen == [None, (0, 30), (50, 52)]


def test_gradients_must_lie_end_to_end():
    draft, (batch, features, head) = make_draft(), make_inputs()
    apart = {name: torch.zeros_like(p) for name, p in draft.trainable().items()}
    with pytest.raises(ValueError, match=r"end to end in one buffer: use FlatAdamW\.grads"):
        TTTEngine(draft, head, decay(3)).step(batch, features, apart)


def test_a_gpu_without_room_says_what_fits(monkeypatch):
    """The free memory is faked: what 2048 chains and a pack of 4096 tokens take."""
    draft, (_, _, head) = make_draft(torch.float32), make_inputs(dtype=torch.float32)
    engine = TTTEngine(draft, head, decay(7).float(), chunk_rows=4096)
    engine.take.device = torch.device("cuda")
    free = table_bytes(chunk_buffers(draft.config, 2048, *engine.sizes) | pack_buffers(draft.config, 4096, torch.float32))
    for name, value in (("memory_reserved", 0), ("memory_allocated", 0), ("mem_get_info", (free, 80 * 2**30))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    with pytest.raises(ValueError, match=r"4096 chains of a pack of 4096 tokens need .* are free; set chunk_rows=2048"):
        engine.reserve(4096)
    engine.chunk_rows = 2048
    engine.reserve(4096)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 2**30))
    engine.take.held.clear()
    with pytest.raises(ValueError, match=r"lower data\.pack_tokens"):
        engine.reserve(9000)
