"""The divided optimizer and its checkpoints: what one process gives, in float64, whatever the number of processes."""

from __future__ import annotations

import itertools
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import by_ranks, losses, train_until
from test_target_families import build
from tiny import draft_shape, target_of
from torch import Tensor, nn

from fastdraft import train as training
from fastdraft.checkpoint import list_checkpoints, load_tensors, read_state, save_checkpoint
from fastdraft.config import OptimConfig
from fastdraft.cost import Layout, Training, peak_flops, plan
from fastdraft.data.loader import Ahead
from fastdraft.dist import mesh
from fastdraft.dist.mesh import Axis
from fastdraft.dist.shard import SharedAdamW
from fastdraft.metrics import read_metrics
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.precision import DTYPES
from fastdraft.optim import FlatAdamW
from fastdraft.run.finished import read_draft
from fastdraft.run.plan import known_work, predict
from fastdraft.target.source import InProcess
from fastdraft.train import train

SHAPES = {"norm": (7,), "matrix": (5, 3), "other norm": (9,), "head": (2, 11)}  # 53 weights, which no number divides
CONFIG = OptimConfig(optimizer="adamw", lr=0.05, weight_decay=0.3, clip=0.7, warmup_ratio=0.3, min_lr_ratio=0.1)
MUON = CONFIG.model_copy(update={"optimizer": "muon", "muon_weights": ["matrix", "head"]})  # each cut by some number


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """Of one of four shares of a step: small in some steps, so that only others are clipped; none in step 2."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = 0.0 if step == 2 else 0.01 if step % 3 else 20.0
    grads = {n: size * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    live = 0.0 if step == 2 else 1.0 + rank
    return grads, torch.full((5, 2), live, dtype=torch.float64)


def shares(optimizer: SharedAdamW, step: int, mine: list[int]) -> Tensor:
    """One step over those of the four shares that are this process's: the norm."""
    sums = torch.zeros(5, 2, dtype=torch.float64)
    for share in mine:
        grads, more = gradients(step, share)
        sums += more
        for name, grad in grads.items():
            optimizer.grads[name] += grad
    norm = optimizer.start(sums)
    total = optimizer.finish()
    assert total is sums and optimizer.finish() is None
    assert float(total[3, 0]) == (0.0 if step == 2 else 10.0)
    assert not optimizer.grad.any()
    return norm


def run_alone(steps: int, config: OptimConfig = CONFIG) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    own = parameters()
    flat = FlatAdamW(own, config, 10, torch.float64)
    norms = []
    for step in range(steps):
        for share in range(4):
            for name, grad in gradients(step, share)[0].items():
                flat.grads[name] += grad
        norms.append(float(flat.step(torch.tensor(0.0 if step == 2 else 10.0, dtype=torch.float64))))
    return {name: p.data.clone() for name, p in own.items()}, norms, flat.state_dict()


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_together_make_the_step_of_one(world, config, tmp_path):
    """Masters, moments, weights, norms; then their checkpoint, read whole, and by another number of processes."""
    assert by_ranks(world, _together, tmp_path, config) == [0] * world
    _, _, state = run_alone(6, config)
    (path,) = list_checkpoints(tmp_path)
    assert len(list(path.glob("*.safetensors"))) == world  # each has written its own
    into = {name: torch.zeros_like(state[name]) for name in ("master", "m", "v", "updates", "step_count")}
    assert load_tensors(read_state(path), into)
    for name, tensor in into.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-12, atol=1e-13)
    other = 2 if world == 4 else 4
    assert by_ranks(other, _read_back, tmp_path, config) == [0] * other


def _mine() -> list[int]:
    return list(range(mesh.rank(), 4, mesh.world()))


def _together(run_dir: Path, config: OptimConfig) -> None:
    mesh.start_process("cpu")
    mesh.lay_out()
    own = parameters()
    optimizer = SharedAdamW(own, config, 10, torch.float64, mesh.axis("replicas"))
    assert optimizer.own.master.numel() == -(-53 // mesh.world())
    assert optimizer.own.m.numel() == optimizer.own.v.numel() == optimizer.own.master.numel()
    norms = [float(shares(optimizer, step, _mine())) for step in range(6)]
    weights, expected_norms, _ = run_alone(6, config)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-12, atol=0)
    for name, p in own.items():
        torch.testing.assert_close(p.data, weights[name], rtol=1e-12, atol=1e-13)

    # Under bf16 the weights are the masters of all, rounded; the masters themselves are of the parameters as they were.
    rounded = parameters()
    shared = SharedAdamW(rounded, config, 10, torch.bfloat16, mesh.axis("replicas"))
    flat = FlatAdamW(parameters(), config, 10, torch.bfloat16)
    assert shared.weights.dtype == torch.bfloat16 and shared.own.master.dtype == torch.float32
    assert torch.equal(shared.weights[:53], flat.weights)
    assert torch.equal(shared.state_dict()["master"].full_tensor(), flat.master)

    # --plan counts each buffer, in bf16 and in fp32.
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        draft = Draft(draft_shape())
        of_draft = config if config.optimizer == "adamw" else config.model_copy(update={"muon_weights": ["*_proj.weight"]})
        shared = SharedAdamW(draft.trainable(), of_draft, 10, dtype, mesh.axis("replicas"))
        own = shared.own
        buffers = {x.data_ptr(): x for x in (own.master, own.m, own.v, own.grad, own.weights, shared.grad, shared.weights)}
        training = Training(draft.config, torch.bfloat16, 8, 8, precision, step={"ttt_length": 2})
        planned = plan(training, target_of(0), Layout(mesh.world()))
        alike = ("fp32", "slices", "draft weights")
        rows = sum(row.size for row in planned.memory if row.name.startswith(alike))
        frozen = draft.config.num_parameters()["embedding"] * dtype.itemsize + draft.d2t.nbytes + draft.t2d.nbytes
        assert abs(rows - frozen - sum(x.nbytes for x in buffers.values())) < 32 * mesh.world()  # of slices filled up

    tensors = optimizer.state_dict() | {"rng.cpu": torch.arange(3)}
    save_checkpoint(run_dir, tensors, {"step": 6}, keep=1)


def _read_back(run_dir: Path, config: OptimConfig) -> None:
    mesh.start_process("cpu")
    mesh.lay_out()
    own = parameters()
    optimizer = SharedAdamW(own, config, 10, torch.float64, mesh.axis("replicas"))
    into = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert load_tensors(read_state(list_checkpoints(run_dir)[0]), into, share=(mesh.rank(), mesh.world()))
    optimizer.load_state_dict(into)
    assert optimizer.own.step_count == 6
    for step in range(6, 9):
        shares(optimizer, step, _mine())
    for name, expected in run_alone(9, config)[0].items():
        torch.testing.assert_close(own[name].data, expected, rtol=1e-12, atol=1e-13)


# --- whole runs -----------------------------------------------------------------------------------------------------------


def _train_in_float64(config, stop_after: int | None = None) -> None:
    """Target, draft, optimizer and metrics in float64; or the first `stop_after` steps of it, ended by a signal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DTYPES, "fp32", torch.float64)
        result = train(config) if stop_after is None else train_until(stop_after, config)
    assert result.stopped_by == (None if stop_after is None else signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.streaming": True, "data.block_conversations": 5, "data.vocab_samples": 20},
        {"sampled_depth": 0.6, "optim.optimizer": "muon", "optim.schedule": "wsd", "optim.lr": 2e-3},
    ],
)
def test_any_number_of_processes_gives_the_same_curve_and_goes_on_with_any_others_checkpoint(
    make_config, tmp_path, changes
):
    """1, 2 and 4 processes, and one run that changes hands 1 -> 2 -> 4 -> 1: every number of every step to 1e-10."""
    changes = {**changes, "optim.packs_per_step": 4, "optim.weight_decay": 0.1, "metrics.log_every": 1, "max_steps": 8}
    changes |= {"eval.every": 4, "eval.max_packs": 3, "checkpoint.every": 5}
    configs = {name: make_config(run_dir=str(tmp_path / name), **changes) for name in ("1", "2", "4", "handed on")}
    _train_in_float64(configs["1"])
    for world in (2, 4):
        assert by_ranks(world, _train_in_float64, configs[str(world)]) == [0] * world
    _train_in_float64(configs["handed on"], 2)
    assert by_ranks(2, _train_in_float64, configs["handed on"], 2) == [0, 0]
    assert by_ranks(4, _train_in_float64, configs["handed on"], 2) == [0] * 4
    _train_in_float64(configs["handed on"])

    expected = losses(configs["1"].run_dir)
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, 9))
    master = read_draft(Path(configs["1"].run_dir), "last")[1].trainable()
    for name, config in configs.items():
        found = losses(config.run_dir)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=1e-10, abs=1e-12), name
        for key, weight in read_draft(Path(config.run_dir), "last")[1].trainable().items():  # as evaluate and export do
            torch.testing.assert_close(weight.data, master[key].data, rtol=1e-6, atol=1e-7)  # read into fp32


def _train_and_note_the_order(config) -> None:
    events = []

    def noted(place, name):
        original = getattr(place, name)

        def call(*args, **more):
            events.append(name)
            return original(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (InProcess, "capture"),
            (Axis, "start_sum_scatter"),
            (SharedAdamW, "_update"),
            (TTTEngine, "step"),
        ):
            patch.setattr(place, name, noted(place, name))
        train(config)
    # A step of two packs each: the next step's first target forward comes between the reduction's begin and its end.
    first = ["capture", "step", "capture", "step"]
    then = ["start_sum_scatter", "capture", "_update", "step", "capture", "step"]
    assert events == first + 2 * then + ["start_sum_scatter", "_update"], events


def test_the_target_runs_while_the_gradients_are_added_up(make_config):
    changes = {"optim.packs_per_step": 4, "max_steps": 3, "metrics.log_every": 100, "checkpoint.every": 100}
    config = make_config(**changes, **{"data.eval_fraction": 0.0})
    assert by_ranks(2, _train_and_note_the_order, config) == [0, 0]


# --- what a run of several processes says of its time ---------------------------------------------------------------------


SLOW_S = 0.3


def _train_with_a_slow_rank(config) -> None:
    """Rank 1 begins each step SLOW_S after rank 0 has come to where it waits for it, however fast either of them is. Rank 0
    notes what it is told of the waiting."""
    folder, step = Path(config.run_dir).parent, itertools.count(1)
    now = 0

    def next_step(ahead, original=Ahead.__next__):
        nonlocal now
        now = next(step)
        while mesh.rank() == 1 and not (folder / f"waits {now}").exists():
            time.sleep(0.01)
        time.sleep(SLOW_S if mesh.rank() == 1 else 0)
        return original(ahead)

    def waits(original):
        def noted(*given):
            if mesh.rank() == 0:
                (folder / f"waits {now}").touch()
            return original(*given)

        return noted

    def told(tokens_per_s, waited, original=training.of_several):
        with (folder / "told").open("a") as file:
            file.write(json.dumps(waited) + "\n")
        return original(tokens_per_s, waited)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "__next__", next_step)
        patch.setattr(SharedAdamW, "finish", waits(SharedAdamW.finish))
        patch.setattr(training.StopSignal, "agreed", waits(training.StopSignal.agreed))
        patch.setattr(training, "of_several", told)
        patch.setattr("fastdraft.run.plan.peak_flops", lambda device: 1e9)
        train(config)


def test_metrics_say_how_long_the_others_waited_for_the_slowest(make_config, tmp_path):
    changes = {"max_steps": 8, "metrics.log_every": 4, "eval.every": 100, "checkpoint.every": 100}
    config = make_config(**changes)
    assert by_ranks(2, _train_with_a_slow_rank, config, seconds=300) == [0, 0]
    lines = [record for record in read_metrics(config.run_dir) if "loss" in record]
    shares = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert len(lines) == len(shares) == 2
    for line, (first, second) in zip(lines, shares, strict=True):
        assert line["tokens_per_s_gpu"] == pytest.approx(line["tokens_per_s"] / 2)
        assert line["wait_reduce"] == min(first, second) and 0 <= second < 1
        assert line["wait_slowest"] == pytest.approx(abs(first - second) / 2)
        assert 0 < line["mfu"] < 1
    # Rank 0 waited in each of the four steps of a line, however long everything else took.
    seconds = [line["time"] for line in lines]
    assert shares[1][0] * (seconds[1] - seconds[0]) > 3 * SLOW_S


def test_work_is_counted_by_hand(make_config, monkeypatch):
    """Tokens times the target's weights but for its ends, and trained tokens times a draft step."""
    config = make_config()
    assert known_work(config, torch.device("cpu")) is None  # nobody knows a CPU's peak
    monkeypatch.setattr("fastdraft.run.plan.peak_flops", lambda device: 1e12)
    work = known_work(config, torch.device("cpu"))
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k and v, o, MLP, two norms of the tiny target
    assert work.target_flops == 2 * (8 * layer + 32) and work.peak == 1e12
    sums = torch.zeros(5, 3, dtype=torch.float64)
    sums[4, 0] = 10
    step = predict(config, torch.device("cpu")).flops[1:]
    assert work.flops(100, sums) == 100 * work.target_flops + 10 * sum(row.size for row in step)


def test_of_a_targets_experts_those_are_counted_that_a_token_goes_through(make_config, monkeypatch, tmp_path):
    """Of four two. A plan counts the whole target's memory all the same, and nothing is known where none is told."""
    build("qwen3_moe").save_pretrained(tmp_path / "experts")
    config, cpu = make_config(**{"target.path": str(tmp_path / "experts")}), torch.device("cpu")
    monkeypatch.setattr("fastdraft.run.plan.peak_flops", lambda device: 1e12)
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 2 * 8 + 4 * 32 + 2 * 32  # attention, norms of heads, router, two norms
    assert known_work(config, cpu).target_flops == 2 * (8 * (layer + 2 * 3 * 32 * 16) + 32)
    planned = predict(config, cpu)
    assert planned.target.idle == planned.target.total - planned.target.used == 8 * 2 * 3 * 32 * 16
    assert planned.flops[0].name == "target forward, of the experts those chosen"
    facts = json.loads((tmp_path / "experts" / "config.json").read_text())
    (tmp_path / "experts" / "config.json").write_text(json.dumps(facts | {"num_experts_per_tok": 4}))
    assert known_work(config, cpu).target_flops == 2 * (8 * (layer + 4 * 3 * 32 * 16) + 32)  # all of them are chosen
    monkeypatch.setattr("fastdraft.target.hf.CHOSEN", ())  # a family that calls it otherwise
    assert known_work(config, cpu) is None
    assert predict(config, cpu).flops[0].name == "target forward, every expert counted"


def test_the_peak_is_the_longest_name_that_fits(monkeypatch):
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H20": None, "NVIDIA GH200 480GB": 989e12}
    peaks |= {"NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GB200": 2500e12, "NVIDIA B200": 2250e12}
    peaks |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12}
    # Names of others that only begin or end so.
    peaks |= dict.fromkeys(["NVIDIA RTX A1000", "NVIDIA A10", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA RTX 4000"])
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
