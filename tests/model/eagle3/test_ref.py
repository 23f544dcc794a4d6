"""The TTT reference against a naive loop over (t, i) written from docs/mathematics.md, its invariances, and the masks.

# L tokens of a document, T TTT steps, V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny import draft_shape, noisy_draft
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead, tau_sim
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.ref import ttt_ref, ttt_ref_step

V, VD, HT, T = 29, 13, 12, 4
DRAFT_IDS = torch.tensor([1, 2, 3, 5, 8, 9, 13, 14, 17, 20, 21, 25, 28])
LENGTHS = (9, 1, 5, 2, 14, 3)
SHAPES = {
    "plain": {},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "fc_norm": {"fc_norm": True, "num_key_value_heads": 1},
    "norm_output": {"norm_output": True, "fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_output": True, "num_key_value_heads": 1},
    "wider_partial_rope": {
        "hidden_size": 20,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def make_draft(**changes) -> Draft:
    draft = noisy_draft(draft_shape(vocab_size=V, draft_vocab_size=VD, **changes), std=0.4)
    draft.set_vocab(DRAFT_IDS)
    return draft


def make_inputs(lengths=LENGTHS, seed=2) -> tuple[Batch, Features, TargetHead]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    batch = Batch(torch.randint(V, (n,), generator=generator), torch.rand(n, generator=generator) < 0.8, tuple(lengths))
    head = TargetHead(normal(V, HT), bias=normal(V), scale=0.7, softcap=5.0)
    return batch, Features(normal(n, 3 * HT), normal(n, HT)), head


def documents(batch: Batch, features: Features) -> list[tuple[Batch, Features]]:
    split = zip(*(x.split(batch.lengths) for x in (batch.input_ids, batch.loss_mask, features.g, features.f)), strict=True)
    return [(Batch(ids, mask, (len(ids),)), Features(g, f)) for ids, mask, g, f in split]


def together(parts: list[tuple[Batch, Features]]) -> tuple[Batch, Features]:
    batches, features = zip(*parts, strict=True)
    batch = Batch(
        torch.cat([b.input_ids for b in batches]),
        torch.cat([b.loss_mask for b in batches]),
        tuple(length for b in batches for length in b.lengths),
    )
    return batch, Features(torch.cat([f.g for f in features]), torch.cat([f.f for f in features]))


# --- the naive loop: one document, one (t, i), one head, one key at a time ----------------------------------------------


def naive_document(draft: Draft, batch: Batch, features: Features, head: TargetHead, kind: str) -> list[dict]:
    """Every row (i, t) of one document, as {loss, alpha, hit, live, masked_in}."""
    w, c = dict(draft.named_parameters()), draft.config
    x, mask, length = batch.input_ids.tolist(), batch.loss_mask.tolist(), batch.num_tokens

    def rms(v: Tensor, weight: Tensor) -> Tensor:
        return v / torch.sqrt((v * v).mean() + c.rms_norm_eps) * weight

    def rope(v: Tensor, position: int) -> Tensor:
        dim = int(c.head_dim * c.rope_parameters.get("partial_rotary_factor", 1.0))
        out = list(v)
        for j in range(dim // 2):
            angle = position * torch.tensor(c.rope_parameters["rope_theta"] ** (-2 * j / dim), dtype=torch.float32).item()
            a, b = v[j], v[j + dim // 2]
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(out)

    def heads(v: Tensor, count: int) -> list[Tensor]:
        return [v[k * c.head_dim : (k + 1) * c.head_dim] for k in range(count)]

    def combine(g: Tensor) -> Tensor:
        if c.fc_norm:
            g = torch.cat([rms(g[k * HT : (k + 1) * HT], w[f"fc_norm.{k}.weight"]) for k in range(3)])
        if c.norm_before_fc:
            g = rms(g, w["input_norm.weight"])
        return w["fc.weight"] @ g

    teacher = []
    for u in range(length):
        z = head.scale * (head.weight @ features.f[u] + head.bias)
        teacher.append(torch.softmax(head.softcap * torch.tanh(z / head.softcap), 0))
    hidden = [combine(features.g[t]) for t in range(length)]
    keys: dict[tuple[int, int], list[Tensor]] = {}
    values: dict[tuple[int, int], list[Tensor]] = {}
    found = []
    for i in range(T):
        queries = {}
        for t in range(length):
            token = x[t + 1 + i] if t + 1 + i < length else 0  # past the end: never live, and read by no live row
            p = "midlayer.self_attn."
            e = rms(w["embed_tokens.weight"][token], w["midlayer.input_layernorm.weight"])
            read = torch.cat([e, rms(hidden[t], w["midlayer.hidden_norm.weight"])])
            queries[t] = [rope(v, t + i) for v in heads(w[p + "q_proj.weight"] @ read, c.num_attention_heads)]
            keys[t, i] = [rope(v, t + i) for v in heads(w[p + "k_proj.weight"] @ read, c.num_key_value_heads)]
            values[t, i] = heads(w[p + "v_proj.weight"] @ read, c.num_key_value_heads)
        for t in range(length):
            seen = [(s, 0) for s in range(t + 1)] + [(t, j) for j in range(1, i + 1)]
            out = []
            for number, q in enumerate(queries[t]):
                kv = number * c.num_key_value_heads // c.num_attention_heads
                weights = torch.softmax(torch.stack([q @ keys[at][kv] for at in seen]) / math.sqrt(c.head_dim), 0)
                out.append(sum(weight * values[at][kv] for weight, at in zip(weights, seen, strict=True)))
            y = hidden[t] + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(out)
            n = rms(y, w["midlayer.post_attention_layernorm.weight"])
            gate, up = w["midlayer.mlp.gate_proj.weight"] @ n, w["midlayer.mlp.up_proj.weight"] @ n
            y = y + w["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
            hidden[t] = rms(y, w["norm.weight"]) if c.norm_output else y
            student = torch.softmax(w["lm_head.weight"] @ rms(y, w["norm.weight"]), 0)
            u = t + 1 + i
            masked_in = u + 1 < length and mask[u + 1]
            live = masked_in and int(teacher[u].argmax()) in DRAFT_IDS.tolist()
            row = {"i": i, "t": t, "masked_in": masked_in, "live": live, "loss": 0.0, "alpha": 0.0, "hit": False}
            if masked_in:
                row["hit"] = int(DRAFT_IDS[student.argmax()]) == int(teacher[u].argmax())
            if live:
                full = teacher[u][DRAFT_IDS]
                row["alpha"] = torch.minimum(full, student).sum()
                ce = -(full / full.sum() * student.log()).sum()
                weight = 0.9 * math.exp(-2.0 * row["alpha"].item())
                row["loss"] = {
                    "kl": ce,
                    "lk_alpha": -row["alpha"].log(),
                    "lk_lambda": weight * ce + (1 - weight) * (1 - row["alpha"]),
                }[kind]
            found.append(row)
    return found


@pytest.mark.parametrize(
    ("shape", "kind"), [*((shape, "kl") for shape in SHAPES), ("gqa", "lk_alpha"), ("gqa", "lk_lambda")]
)
def test_rows_and_gradient_equal_the_naive_loop(shape, kind):
    """To the last bit of the float32 frequencies."""
    draft = make_draft(**SHAPES[shape])
    batch, features, head = make_inputs(lengths=(7, 1, 5, 11))
    weights = 0.8 ** torch.arange(T, dtype=torch.float64)
    rows, grads = ttt_ref_step(draft, batch, features, head, weights, kind, 0.9, 2.0)

    total, first = torch.zeros((), dtype=torch.float64), 0
    for document, its in documents(batch, features):
        for row in naive_document(draft, document, its, head, kind):
            i, at = row["i"], first + row["t"]
            for name in ("loss", "alpha"):
                ours = rows.loss[i, at] if name == "loss" else rows.acceptance[i, at]
                assert ours.item() == pytest.approx(torch.as_tensor(row[name]).item(), rel=1e-7, abs=1e-12)
            assert (bool(rows.hit[i, at]), bool(rows.live[i, at]), bool(rows.masked_in[i, at])) == (
                row["hit"],
                row["live"],
                row["masked_in"],
            )
            total = total + weights[i] * row["loss"]
        first += document.num_tokens
    assert rows.live.any(1).all() and not torch.equal(rows.live, rows.masked_in)
    names, parameters = zip(*draft.trainable().items(), strict=True)
    for name, grad in zip(names, torch.autograd.grad(total, parameters), strict=True):
        assert float((grads[name] - grad).abs().max()) <= 1e-6 * float(grad.abs().max()), name


# --- how a global batch is cut does not matter --------------------------------------------------------------------------


def cuts(parts: list) -> dict[str, list[list]]:
    return {
        "one document at a time": [[part] for part in parts],
        "two packs": [parts[:3], parts[3:]],
        "other order": [[parts[k] for k in (4, 0, 5, 2, 1, 3)]],
        "other order, three packs": [[parts[5], parts[1]], [parts[0], parts[3]], [parts[2], parts[4]]],
    }


@pytest.mark.parametrize("cut", cuts(list(range(6))))
@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
def test_gradient_does_not_depend_on_the_cut(cut, kind):
    draft, (batch, features, head) = make_draft(**SHAPES["gqa"]), make_inputs()
    weights = 0.8 ** torch.arange(T, dtype=torch.float64)
    rows, whole = ttt_ref_step(draft, batch, features, head, weights, kind)
    sums, grads = torch.zeros(5, T, dtype=torch.float64), {name: torch.zeros_like(g) for name, g in whole.items()}
    for pack in cuts(documents(batch, features))[cut]:
        part_rows, part_grads = ttt_ref_step(draft, *together(pack), head, weights, kind)
        sums += part_rows.sums()
        for name, grad in part_grads.items():
            grads[name] += grad
    torch.testing.assert_close(sums, rows.sums(), rtol=1e-12, atol=1e-12)
    for name, grad in whole.items():
        assert float((grads[name] - grad).abs().max()) <= 1e-10 * float(grad.abs().max()), name


# --- masks ---------------------------------------------------------------------------------------------------------------


def test_only_live_rows_count():
    draft, (batch, features, head) = make_draft(), make_inputs()
    rows = ttt_ref(draft, batch, features, head, T)
    top = head.logits(features.f).argmax(-1)
    for i in range(T):
        for t in range(batch.num_tokens):
            u = t + 1 + i
            masked_in = u + 1 < batch.doc_end[t] and bool(batch.loss_mask[u + 1])
            assert bool(rows.masked_in[i, t]) == masked_in
            assert bool(rows.live[i, t]) == (masked_in and int(top[u]) in DRAFT_IDS)
    for values in (rows.loss, rows.acceptance):
        assert (values[~rows.live] == 0).all() and (values[rows.live] > 0).all()
    assert not rows.hit[~rows.masked_in].any()


def test_masked_documents_change_nothing():
    """A fully masked document beside others: its rows are exactly 0, the gradient exactly that of the others."""
    draft, (batch, features, head) = make_draft(), make_inputs()
    weights = torch.ones(T, dtype=torch.float64)
    parts = documents(batch, features)
    silent = Batch(parts[4][0].input_ids, torch.zeros(14, dtype=torch.bool), (14,)), parts[4][1]
    rows, grads = ttt_ref_step(draft, *together([silent]), head, weights)
    assert not rows.sums().any() and not any(g.any() for g in grads.values())
    assert len(grads) == len(draft.trainable())


def test_what_no_live_row_reads_has_no_effect():
    """Features and tokens after a document's last trained token, and its first token, change no loss and no gradient."""
    draft, (batch, features, head) = make_draft(), make_inputs(lengths=(10,), seed=5)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[4:7] = True
    batch = Batch(batch.input_ids, mask, (10,))
    weights = torch.ones(T, dtype=torch.float64)
    rows, grads = ttt_ref_step(draft, batch, features, head, weights)
    assert rows.live[0].any()
    ids, g, f = batch.input_ids.clone(), features.g.clone(), features.f.clone()
    ids[0], ids[6:] = 0, 0  # x_6 is the last predicted, so at most x_5 is read
    g[5:], f[6:] = 100.0, -100.0  # rows t <= 4 read g_t, u <= 5
    f[0] = 7.0  # u >= 1
    others, other_grads = ttt_ref_step(draft, Batch(ids, mask, (10,)), Features(g, f), head, weights)
    assert torch.equal(rows.loss, others.loss)
    for name in grads:
        assert torch.equal(grads[name], other_grads[name]), name


def test_short_documents_have_no_rows():
    draft, (_, _, head) = make_draft(), make_inputs()
    batch, features, _ = make_inputs(lengths=(1, 2, 1))
    batch = Batch(batch.input_ids, torch.ones(4, dtype=torch.bool), batch.lengths)
    assert not ttt_ref(draft, batch, features, head, T).sums().any()


def test_teacher_is_f_and_not_g():
    """The loss follows f through the head alone: the same P from another head and f gives the same rows."""
    draft, (batch, features, head) = make_draft(), make_inputs()
    turn = torch.linalg.qr(torch.randn(HT, HT, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    turned = TargetHead(head.weight @ turn, head.bias, head.scale, head.softcap)
    ours, theirs = (
        ttt_ref(draft, batch, Features(features.g, f), h, T).sums()
        for f, h in ((features.f, head), (features.f @ turn, turned))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_unknown_loss_is_refused():
    draft, (batch, features, head) = make_draft(), make_inputs()
    with pytest.raises(ValueError, match="'l2' is not one of kl, lk_alpha, lk_lambda"):
        ttt_ref(draft, batch, features, head, T, "l2")


def test_batch_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="document lengths sum to 5, but input_ids is"):
        Batch(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), (2, 3))


def test_tau_sim():
    assert tau_sim(torch.tensor([0.5, 0.5, 0.0, 1.0])) == 1.75
    assert tau_sim(torch.ones(7)) == 8.0


def test_sums_are_float64_per_step():
    one = torch.ones(2, 3)
    sums = Rows(one, one * 2, one.bool(), one.bool(), one.bool()).sums()
    assert sums.dtype == torch.float64 and sums.tolist() == [[3, 3], [6, 6], [3, 3], [3, 3], [3, 3]]
