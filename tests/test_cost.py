"""Predictions against what a real, tiny step on the CPU holds and does, and a meta step of an 8B draft's size."""

import io
import multiprocessing
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_step import LiveBytes, flop_counter, meta_step
from rich.console import Console
from tiny import draft_shape, target_of
from torch.utils.flop_counter import FlopCounterMode

from bench.work import SHAPES
from fastdraft import checkpoint as checkpoints
from fastdraft import cost
from fastdraft import train as training
from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.checkpoint import list_checkpoints
from fastdraft.cost import Layout, Training, checkpoint_copies, render
from fastdraft.files import free_disk
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.eagle3.cost import pair_cost
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.eagle3.memory import fp8_shapes
from fastdraft.model.eagle3.ref import ttt_ref
from fastdraft.optim import FlatAdamW
from fastdraft.run.finished import export_run
from fastdraft.run.plan import predict
from fastdraft.target.hf import RUN_TOKENS, load_target, load_target_config, target_sizes
from fastdraft.train import train


def config(**changes):
    wide = dict(hidden_size=48, target_hidden_size=48, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2)
    return draft_shape(**wide | dict(head_dim=16, vocab_size=320, draft_vocab_size=100) | changes)


def plan(c, *, target_params, target_dtype, pack_tokens, document_tokens=None, precision="bf16", device="cuda", **more):
    """Of a draft's shape, and of what its step takes; a pack is one document where no length is given."""
    of_plan = {name: more.pop(name) for name in ("keep",) if name in more}
    tensor = more.pop("tensor", 1)
    layout = Layout(more.pop("replicas", 1) * tensor, tensor=tensor)
    told = Training(c, target_dtype, pack_tokens, document_tokens or pack_tokens, precision, device, step=more)
    return cost.plan(told, target_of(target_params), layout, **of_plan)


def sizes(rows):
    return {row.name: row.size for row in rows}


def tiny_step(c, dtype, steps, lengths, loss="kl"):
    """Draft, and a function that runs one forward of the reference on random inputs."""
    draft = Draft(c)
    draft.init_weights(0.02, torch.Generator().manual_seed(0))
    draft.set_vocab(torch.arange(c.draft_vocab_size))
    draft = draft.to(dtype)
    n = sum(lengths)
    batch = Batch(torch.randint(0, c.vocab_size, (n,)), torch.ones(n, dtype=torch.bool), lengths)
    features = Features(
        torch.randn(n, 3 * c.target_hidden_size, dtype=dtype), torch.randn(n, c.target_hidden_size, dtype=dtype)
    )
    head = TargetHead(torch.randn(c.vocab_size, c.target_hidden_size, dtype=dtype))
    held = [*draft.parameters(), *draft.buffers(), features.g, features.f, head.weight]
    return draft, held, lambda: ttt_ref(draft, batch, features, head, steps, loss)


def kept_bytes(held, forward):
    """Bytes of the distinct storages autograd still holds after the forward, inputs and weights left out."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    saved = weakref.WeakSet()

    def pack(tensor):
        box = Saved(tensor.detach())  # an output with its graph would hold itself for ever
        saved.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        rows = forward()
    inputs = {t.untyped_storage().data_ptr() for t in held}
    storages = {s.data_ptr(): s.nbytes() for s in (box.tensor.untyped_storage() for box in saved)}
    assert rows.loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in inputs)


NORM_BEFORE_FC = {"norm_before_fc": True, "norm_output": True, "target_hidden_size": 64}


@pytest.mark.parametrize(
    "changes", [{}, {"fc_norm": True, "target_hidden_size": 64}, {"draft_vocab_size": 320}, NORM_BEFORE_FC]
)
def test_parameter_and_optimizer_bytes_are_exact(changes):
    c = config(**changes)
    draft = Draft(c).to(torch.bfloat16)
    trainable = list(draft.trainable().values())
    p = plan(c, target_params=1000, target_dtype=torch.bfloat16, pack_tokens=64, ttt_length=3)
    memory = sizes(p.memory)
    count = c.num_parameters()
    assert count["trainable"] == sum(w.numel() for w in trainable)
    assert count["embedding"] == draft.embed_tokens.weight.numel()
    assert memory["draft weights (bf16)"] == sum(t.nbytes for t in draft.state_dict().values())
    masters = [w.detach().float() for w in trainable]
    optimizer = torch.optim.AdamW(masters, foreach=False)
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    assert memory["fp32 master weights"] == sum(t.nbytes for t in masters)
    assert memory["fp32 moments (two)"] == sum(t.nbytes for t in moments)
    assert memory["fp32 gradient"] == sum(t.grad.nbytes for t in masters)
    assert memory["gradient of one pack (bf16)"] == sum(w.nbytes for w in trainable)
    assert memory["target weights"] == 2000
    own = [draft.embed_tokens.weight] if c.hidden_size != c.target_hidden_size else []
    assert sizes(p.disk)["one more while it is written"] == sum(
        t.nbytes for t in [*masters, *moments, draft.d2t, draft.t2d, *own]
    )
    exported = [*trainable, draft.t2d]
    if c.draft_vocab_size != c.vocab_size:
        exported.append(draft.d2t)
    if c.hidden_size != c.target_hidden_size:
        exported.append(draft.embed_tokens.weight)
    assert sizes(p.disk)["export"] == sum(t.nbytes for t in exported)


@pytest.mark.parametrize(
    ("dtype", "steps", "lengths", "loss", "changes"),
    [
        (torch.float32, 4, (64, 64), "kl", {}),
        (torch.bfloat16, 4, (64, 64), "kl", {}),
        (torch.bfloat16, 1, (128,), "lk_lambda", {"draft_vocab_size": 320}),
        (torch.float32, 7, (32, 32, 16), "lk_alpha", {"hidden_size": 96, "intermediate_size": 64}),
        (torch.bfloat16, 3, (96,), "kl", {"num_attention_heads": 2, "head_dim": 64, "vocab_size": 2000}),
        (torch.float32, 5, (64, 64), "kl", {"norm_output": True, "hidden_size": 128}),
        (torch.bfloat16, 5, (64, 64), "kl", {"norm_output": True, "hidden_size": 128}),
    ],
)
def test_activations_match_what_autograd_keeps(dtype, steps, lengths, loss, changes):
    c = config(**changes)
    _, held, forward = tiny_step(c, dtype, steps, lengths, loss)
    p = plan(
        c,
        target_params=0,
        target_dtype=dtype,
        pack_tokens=sum(lengths),
        document_tokens=max(lengths),
        ttt_length=steps,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        loss=loss,
    )
    memory = sizes(p.memory)
    predicted = sum(memory[name] for name in ("activations kept for the backward", "attention scores kept", "logits kept"))
    teacher = 4 * sum(lengths) * c.draft_vocab_size  # alive during the step, needed by no backward
    assert predicted - teacher == pytest.approx(kept_bytes(held, forward), rel=0.05)
    assert memory["features g and f"] == held[-3].nbytes + held[-2].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(256,), (64,) * 4])
def test_a_target_takes_most_of_its_activations_and_no_more(target_dir, dtype, lengths):
    """Beside its weights and what it leaves. On a GPU they come to a step's memory, which stays; on the CPU a step's
    short-lived tensors are gone while the target runs."""
    target, batch = load_target(str(target_dir), dtype, torch.device("cpu"), (1, 3, 5)), all_trained(*lengths)
    held = [*target.model.parameters(), *target.model.buffers(), batch.input_ids, batch.loss_mask]
    with LiveBytes(held, "cpu") as made:
        features = target.capture(batch)
    told = Training(config(), dtype, sum(lengths), max(lengths), "fp32", run_tokens=RUN_TOKENS, step={"ttt_length": 2})
    facts = target_sizes(load_target_config(str(target_dir)))
    rows = sizes(told.memory(facts))
    taken = made.peak - features.g.nbytes - features.f.nbytes
    assert 0.65 * rows["target's activations"] < taken < rows["target's activations"]
    assert "target's activations" not in sizes(told.memory(facts, stored=True))
    beyond, tokens = "target's or optimizer's temporaries, beyond a step's", 16 * sum(lengths)
    long = {"pack_tokens": tokens, "document_tokens": tokens, "step": {"ttt_length": 2, "step": "fused", "chunk_rows": 1}}
    of_cpu = replace(told, device="cpu", **long).memory(facts)
    short_lived = sum(row.size for row in of_cpu if row.short_lived)
    assert sizes(of_cpu)[beyond] == 16 * rows["target's activations"] - short_lived > 0
    few = replace(told, device="cpu", step=long["step"]).memory(target_of(0))
    short_lived = sum(row.size for row in few if row.short_lived)
    assert sizes(few)[beyond] == 8 * told.trainable - short_lived > 0


def test_fp32_weights_are_the_masters():
    c = config()
    memory = sizes(
        plan(c, target_params=0, target_dtype=torch.bfloat16, pack_tokens=8, ttt_length=2, precision="fp32").memory
    )
    draft = Draft(c)
    frozen = [draft.embed_tokens.weight, draft.d2t, draft.t2d]
    assert memory["draft's frozen embedding"] == sum(t.nbytes for t in frozen)
    assert memory["fp32 master weights"] == sum(t.nbytes for t in draft.trainable().values())


@pytest.mark.parametrize(
    "changes", [{}, {"fc_norm": True, "target_hidden_size": 64, "num_key_value_heads": 4}, NORM_BEFORE_FC]
)
def test_flops_match_a_counted_step(changes):
    c = config(**changes)
    _, _, forward = tiny_step(c, torch.float32, 3, (48, 48))
    with FlopCounterMode(display=False) as counter:
        forward().loss.sum().backward()
    p = plan(
        c, target_params=0, target_dtype=torch.float32, pack_tokens=96, document_tokens=48, ttt_length=3, precision="fp32"
    )
    assert p.flops_per_token * 96 == pytest.approx(counter.get_total_flops(), rel=0.01)


# --- the fused engine ----------------------------------------------------------------------------------------------------

LLAMA_8B = SHAPES["llama-3.1-8b"].model_dump()
BF16, FP32 = torch.bfloat16, torch.float32


def all_trained(*lengths):
    n = sum(lengths)
    return Batch(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), lengths)


def fused_plan(c, n, steps, chunk_rows, dtype, target_dtype, **options):
    precision = "bf16" if dtype == BF16 else "fp32"
    options = dict(target_params=0, target_dtype=target_dtype, precision=precision, step="fused") | options
    return plan(c, pack_tokens=n, ttt_length=steps, chunk_rows=chunk_rows, **options)


def engine_bytes(p):
    """What the engine itself makes: the rows after the features."""
    names = [row.name for row in p.memory]
    return sum(row.size for row in p.memory[names.index("features g and f") + 1 :])


@pytest.mark.parametrize(
    ("n", "chunk_rows", "steps", "dtype", "target_dtype", "changes"),
    [
        (8192, 4096, 7, BF16, BF16, LLAMA_8B),
        (4096, 1024, 7, FP32, BF16, LLAMA_8B),
        (8192, None, 7, BF16, BF16, LLAMA_8B),
        (2048, 512, 7, FP32, FP32, {}),
        (2048, 512, 1, BF16, BF16, {"draft_vocab_size": 320}),
        (2048, 256, 2, BF16, BF16, {"fc_norm": True, "target_hidden_size": 96}),
        (2048, 256, 3, BF16, BF16, NORM_BEFORE_FC),
        (8192, None, 7, BF16, BF16, LLAMA_8B | {"norm_output": True, "fc_norm": True}),
        (2048, 512, 2, BF16, BF16, {"vocab_size": 40000}),
        (2048, 512, 2, BF16, FP32, {"vocab_size": 8000, "draft_vocab_size": 8000}),
    ],
)
def test_fused_memory_matches_a_step_on_meta_tensors(n, chunk_rows, steps, dtype, target_dtype, changes):
    c = config(**changes)
    made = meta_step(c, all_trained(n), steps, chunk_rows, dtype, target_dtype)
    predicted = engine_bytes(fused_plan(c, n, steps, chunk_rows, dtype, target_dtype))
    assert predicted == pytest.approx(made.peak, rel=0.04)


@pytest.mark.parametrize(("n", "chunk_rows", "changes"), [(8192, None, LLAMA_8B), (2048, 512, {"draft_vocab_size": 320})])
def test_memory_of_fp8_matches_a_step_on_meta_tensors(n, chunk_rows, changes):
    """The default chunk is that of bf16."""
    c = config(**changes)
    made = meta_step(c, all_trained(n), 7, chunk_rows, BF16, fp8=True)
    p = fused_plan(c, n, 7, chunk_rows, BF16, BF16, precision="fp8")
    assert engine_bytes(p) == pytest.approx(made.peak, rel=0.04)
    plain = sizes(fused_plan(c, n, 7, chunk_rows, BF16, BF16).memory)
    added = sizes(p.memory)
    weights = 2 * sum(outputs * inputs for outputs, inputs in fp8_shapes(c).values())
    assert weights < added.pop("weights and rows in fp8") < 1.1 * weights + 4 * 512 * c.intermediate_size
    assert added == plain


@pytest.mark.parametrize(
    ("lengths", "chunk_rows", "steps", "dtype"),
    [((256,), 4096, 4, FP32), ((512,), 128, 1, FP32), ((128,) * 4, 128, 7, FP32), ((256,), 4096, 4, BF16)],
)
def test_fused_memory_on_the_cpu_matches_a_real_step(lengths, chunk_rows, steps, dtype):
    c = config()
    draft, held, _ = tiny_step(c, dtype, steps, lengths)
    *_, g, f, head = held
    batch = all_trained(*lengths)
    grads = flat_gradients(draft.trainable())
    with LiveBytes([*held, *grads.values(), batch.input_ids, batch.loss_mask], "cpu") as made:
        engine = TTTEngine(draft, TargetHead(head), torch.ones(steps), chunk_rows=chunk_rows)
        engine.step(batch, Features(g, f), grads)
    predicted = engine_bytes(fused_plan(c, sum(lengths), steps, chunk_rows, dtype, dtype, device="cpu"))
    assert predicted == pytest.approx(made.peak, rel=0.15)


@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ((2000, 2000), LLAMA_8B),
        ((300, 300, 120), {"fc_norm": True, "target_hidden_size": 64, "num_key_value_heads": 4}),
        ((300, 120), NORM_BEFORE_FC),
    ],
)
def test_fused_flops_match_a_counted_step(lengths, changes):
    """All but attention; one chunk, so that no teacher row is computed for two chunks."""
    c, n = config(**changes), sum(lengths)
    counter = flop_counter()
    meta_step(c, all_trained(*lengths), 4, n, FP32, modes=(counter,))
    work = sizes(fused_plan(c, n, 4, n, FP32, FP32, document_tokens=lengths[0]).flops)
    assert work["draft step but for attention"] * n == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_fused_attention_flops_are_those_of_the_pairs():
    c, n, length, steps = config(), 50, 20, 5
    p = fused_plan(c, n, steps, n, BF16, BF16, document_tokens=length)
    width, total = c.num_attention_heads * c.head_dim, 0
    for doc in (20, 20, 10):
        for i in range(steps):
            for t in range(doc - 2 - i):
                total += 2 * width * (9 * (t + 1) + 7 * i)
    assert sizes(p.flops)["draft's attention"] == total // n


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@settings(max_examples=30, deadline=None)
@given(pack=st.integers(1, 10_000), rows=st.integers(1, 5000), steps=st.integers(1, 12))
def test_more_of_anything_never_needs_less_of_the_fused(device, pack, rows, steps):
    def memory(pack, rows, steps):
        return fused_plan(config(), pack, steps, rows, BF16, BF16, device=device).memory_bytes

    here = memory(pack, rows, steps)
    assert memory(pack + 1, rows, steps) > here
    assert memory(pack, rows + 1, steps) >= here
    assert memory(pack, rows, steps + 1) > here


@settings(max_examples=50, deadline=None)
@given(pack=st.integers(1, 10_000), document=st.integers(1, 10_000), steps=st.integers(1, 12))
def test_more_of_anything_never_needs_less(pack, document, steps):
    def memory(pack, document, steps):
        return plan(
            config(),
            target_params=10,
            target_dtype=torch.bfloat16,
            pack_tokens=pack,
            document_tokens=document,
            ttt_length=steps,
        ).memory_bytes

    here = memory(pack, document, steps)
    assert memory(pack + 1, document, steps) > here
    assert memory(pack, document, steps + 1) > here
    assert memory(pack, pack, steps) >= here  # one long document has the most attention pairs


@pytest.mark.parametrize(
    ("target_dtype", "precision", "width"), [("fp32", "fp32", 32), ("fp32", "fp32", 64), ("auto", "bf16", 16)]
)
def test_a_runs_files_are_as_large_as_predicted(make_config, tmp_path, target_dtype, precision, width):
    """Also of a draft of another width, whose embedding is its own; the target's files are in fp32."""
    changes = {"target.dtype": target_dtype, "draft.overrides": {"hidden_size": width, "intermediate_size": 600}}
    config = make_config(precision=precision, max_steps=2, **changes, **{"eval.every": 100, "checkpoint.keep": 1})
    train(config)
    export_run(Path(config.run_dir), tmp_path / "out", "last", overwrite=False)
    (checkpoint,) = list_checkpoints(Path(config.run_dir))
    disk = sizes(predict(config, torch.device("cpu")).disk)
    for name, folder in (("one more while it is written", checkpoint), ("export", tmp_path / "out")):
        assert disk[name] == pytest.approx(sum(file.stat().st_size for file in folder.iterdir()), rel=0.04), name


def peaks_of_runs(small, large, pipe) -> None:
    """Sends the peaks of this process's memory while each of `large` trains, above what `small` left: in a step and in
    AdamW's update, while a checkpoint is copied, and until the next update. Only Linux tells a peak and begins a new one.
    """
    place, peaks = ["step"], {}

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    def turn(name: str) -> None:
        peaks[place[0]] = max(peaks.get(place[0], 0), kilobytes("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        place[0] = name

    def watched(name: str, act, then: str):
        def call(*args, **options):
            turn(name)
            result = act(*args, **options)
            turn(then)
            return result

        return call

    train(small, fresh=True)  # imports, and what else the first run leaves behind
    before = kilobytes("VmRSS")
    FlatAdamW.step = watched("update", FlatAdamW.step, "step")
    checkpoints.Writer.save = watched("save", checkpoints.Writer.save, "after a checkpoint")
    of_runs = []
    for run in large:
        turn("step")
        peaks.clear()
        train(run, fresh=True)
        turn("end")
        of_runs.append({name: 1024 * (peak - before) for name, peak in peaks.items()})
    pipe.send(of_runs)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
@pytest.mark.parametrize(("step", "rel"), [("fused", 0.05), ("reference", 0.15)])
def test_the_peak_of_a_run_on_the_cpu_is_predicted(step, rel, make_config, tmp_path, monkeypatch):
    """Tiny chunks and a long MLP: AdamW's temporaries are the most that a run takes, then beside a checkpoint's copy."""

    def config(name: str, width: int, every: int):
        changes = {"run_dir": str(tmp_path / name), "draft.overrides": {"draft_vocab_size": 64, "intermediate_size": width}}
        return make_config(
            step=step,
            chunk_rows=1,
            max_steps=3,
            **changes,
            **{"eval.every": 100, "optim.packs_per_step": 1, "checkpoint.every": every},
        )

    small, large = config("small", 64, every=1), config("large", 120_000, every=1)
    once = config("large", 120_000, every=100)
    predicted = predict(large, torch.device("cpu"))
    copy = sizes(predicted.memory)["copy for writing checkpoints"]
    expected = {"before the first": predicted.memory_bytes - copy, "whole": predicted.memory_bytes}
    # glibc keeps freed matrices of this size for later, at times, and counts them as the process's. With a threshold of our
    # own it gives them back at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=peaks_of_runs, args=(small, [once, large], theirs))
    process.start()
    theirs.close()
    first, peaks = ours.recv()
    process.join()
    measured = {"before the first": max(first["step"], first["update"]), "whole": max(peaks.values())}
    assert measured == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sampled_depth_counts_the_share_of_each_step(device):
    def work(steps: int, p: float) -> list[int]:
        common = dict(target_params=0, target_dtype=torch.bfloat16, pack_tokens=300, step="fused", device=device)
        predicted = plan(config(), ttt_length=steps, sampled_depth=p, **common)
        return [row.size for row in predicted.flops[1:]]

    upto = torch.tensor([work(steps, 1.0) for steps in (1, 2, 3)], dtype=torch.float64)
    law = upto[0] + 0.5 * (upto[1] - upto[0]) + 0.25 * (upto[2] - upto[1])
    torch.testing.assert_close(torch.tensor(work(3, 0.5), dtype=torch.float64), law, rtol=1e-3, atol=0)


def test_fp8_is_predicted_for_no_cpu():
    with pytest.raises(ValueError, match=r"precision: fp8 is for GPUs, a run on the CPU refuses it; set precision=bf16"):
        fused_plan(config(), 64, 2, 8, BF16, BF16, precision="fp8", device="cpu")


@pytest.mark.parametrize(
    "changes",
    [{}, {"draft.overrides": {"hidden_size": 64}}],
)
def test_the_copy_that_is_written_is_as_large_as_predicted(make_config, monkeypatch, changes):
    """But for the state of the random numbers and the sums since the last line of metrics."""
    writers, init = [], checkpoints.Writer.__init__
    monkeypatch.setattr(
        checkpoints.Writer, "__init__", lambda self, *a, **k: (writers.append(self), init(self, *a, **k))[0]
    )
    config = make_config(max_steps=2, **{"eval.every": 100}, **changes)
    train(config)
    (writer,) = writers
    small = ("rng.cpu", "window.sums", "window.skipped_steps", "updates", "step_count")
    copied = sum(x.nbytes for name, x in writer._copies.items() if name not in small)
    assert sizes(predict(config, torch.device("cpu")).memory)["copy for writing checkpoints"] == copied > 0


@pytest.mark.parametrize(
    ("replicas", "tensor", "expected"),
    [
        # 12 bytes a weight, in three pieces, each rounded up to a power of two
        (1, 1, {"copy for writing checkpoints": 3 * 2**17}),
        (4, 1, {"copy for writing checkpoints, 1/4": 3 * 2**15}),
        (
            2,
            2,
            {
                "copy for writing checkpoints, of the whole draft": 12 * 30_000,
                "the draft's joined weights, while they are copied": 12 * 30_000,
            },
        ),
    ],
)
def test_the_copy_for_a_gpu_lies_on_its_host(replicas, tensor, expected):
    maps = 1000
    rows = checkpoint_copies(30_000, maps, replicas, tensor, pinned=True)
    first = next(iter(expected))
    assert sizes(rows) == expected | {first: expected[first] + maps}
    c = config()
    common = dict(target_params=0, target_dtype=torch.bfloat16, pack_tokens=300, ttt_length=2, replicas=replicas)
    host = {device: plan(c, step="fused", device=device, tensor=tensor, **common).host for device in ("cpu", "cuda")}
    trainable = c.num_parameters()["trainable"]
    assert host["cpu"] == ()
    assert host["cuda"] == checkpoint_copies(trainable, 8 * 100 + 320, replicas, tensor, pinned=True)


def test_a_checkpoint_asks_for_the_room_it_takes(make_config, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "free_disk", lambda *what: asked.append(what))
    config = make_config(max_steps=2, **{"eval.every": 100, "draft.overrides": {"hidden_size": 64}})
    train(config)
    (checkpoint,) = list_checkpoints(Path(config.run_dir))
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    ((_, needed, what),) = asked
    assert needed == pytest.approx(size, rel=0.04) and what == "the checkpoint of step 2"


def test_disk_counts_every_checkpoint_kept():
    p = plan(config(), target_params=0, target_dtype=torch.bfloat16, pack_tokens=8, ttt_length=2, keep=3)
    disk = sizes(p.disk)
    # three latest, the best, one in writing
    assert sum(disk.values()) == 5 * disk["one more while it is written"] + disk["export"]


def test_disk_counts_a_cache_of_features(make_config):
    cached = {"features.path": "store", "features.mode": "cache", "features.max_gib": 1.5}
    with_cache, without = (sizes(predict(make_config(**changes), torch.device("cpu")).disk) for changes in (cached, {}))
    more = sum(with_cache.values()) - sum(without.values())
    assert more == 1.5 * 2**30 == with_cache["cache of features, at most"]


def test_free_disk_names_the_shortage(tmp_path):
    missing = tmp_path / "not" / "yet"
    assert free_disk(missing) > 0
    with pytest.raises(ValueError, match=r"a checkpoint needs .* GiB at .*yet, which has .* GiB free"):
        free_disk(missing, needed=2**60)


@pytest.mark.parametrize("width", [20, 40, 100])
def test_render_at_any_width(width):
    p = plan(config(), target_params=10**9, target_dtype=torch.bfloat16, pack_tokens=4096, ttt_length=7)
    out = io.StringIO()
    render(p, Console(file=out, width=width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    if width == 100:
        assert f"{p.memory_bytes / 2**30:.3f}" in out.getvalue()
        assert "target weights" in out.getvalue()


def test_pair_cost_of_llama_8b():
    """In a document of 64k tokens attention costs about as much as all other work; in one of 4k it hardly counts."""
    draft = SHAPES["llama-3.1-8b"]
    cost = pair_cost(draft, 8_030_261_248, 7)
    assert 0.9 < 65536 * cost < 1.2 and 4096 * cost < 0.08
