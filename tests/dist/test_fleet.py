"""The arithmetic of a plan for many GPUs, by hand for published shapes, and against what processes really hold."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import by_ranks
from tiny import LLAMA_8B, make_tokenizer, refusal

from fastdraft.config import Config, parse_config
from fastdraft.dist import fleet, mesh
from fastdraft.dist.fleet import Hardware, Layout
from fastdraft.files import GIB
from fastdraft.run.plan import fleet_planner
from fastdraft.target.hf import load_target, target_sizes
from fastdraft.target.sharded import local

LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
LLAMA_405B = LLAMA_8B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
}
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}


def make_config(folder: Path, facts: dict, **changes) -> Config:
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"} | facts))
    tree = {
        "target": {"path": str(folder)},
        "data": {"paths": ["chats.jsonl"], "max_length": 4096, "pack_tokens": 16384},
        "optim": {"packs_per_step": 32, "optimizer": "adamw"},
        "run_dir": str(folder / "run"),
    }
    return parse_config(tree | changes, Config)


@pytest.mark.parametrize(
    "facts, total, active, width",
    [(LLAMA_70B, 70.55, 70.55, 28672), (QWEN3_235B, 235.09, 22.19, 8 * 1536), (GPT_OSS_120B, 116.83, 5.71, 4 * 2880)],
)
def test_published_sizes(facts, total, active, width):
    """As their makers count them, in units of 1e9; a token also reads one row of the embedding, which we leave out."""
    before = copy.deepcopy(facts)
    sizes = target_sizes(facts)
    assert facts == before  # transformers writes into what it is given
    assert round(sizes.total / 1e9, 2) == total
    embedding = facts["vocab_size"] * facts["hidden_size"]
    assert round((sizes.active + embedding) / 1e9, 2) == pytest.approx(active, abs=0.011)
    assert sizes.used - sizes.outside == sizes.active - embedding  # all layers but for the experts that are not chosen
    assert sizes.mlp_width == width


def test_a_70b_target_on_eight_gpus(tmp_path):
    planned = fleet_planner(make_config(tmp_path, LLAMA_70B), Hardware())
    whole, sharded = planned(Layout(8)), planned(Layout(8, holders=8))
    assert not whole.fits and sharded.fits

    # Of a layer: q and o 8192 x 8192, k and v 8192 x 1024, three products of the MLP, two norms. bf16 has two bytes.
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    rows = {row.name: row.size for row in sharded.memory}
    assert rows["target's layers, 1/8"] == 80 * layer * 2 // 8
    assert rows["3 layers of the target whole"] == 3 * layer * 2
    assert rows["target's embedding, head and norms"] == (2 * 128256 * 8192 + 8192) * 2
    trainable = 3 * 8192**2 + 2 * 8192 * (8192 + 2 * 1024) + 8192**2 + 3 * 8192 * 28672 + 4 * 8192 + 32000 * 8192
    assert rows["fp32 master weights, 1/8"] == 4 * trainable // 8
    assert rows["fp32 moments (two), 1/8"] == 8 * trainable // 8
    assert rows["slices of gradient and weights, on their way"] == (4 + 2) * trainable // 8
    assert rows["fp32 gradient"] == 4 * trainable
    assert rows["features g and f"] == 4 * 8192 * 16384 * 2
    assert rows["target's activations"] == 16384 * (6 * 8192 + 8192 + 3 * 28672) * 2

    # 4 packs a GPU, all of a GPU's links at 360 GB/s, products at 540 TFLOP/s; attention over half of 4096 tokens a token.
    tokens, active = 4 * 16384, 80 * layer + 128256 * 8192
    assert sharded.target_s == pytest.approx(tokens * (2 * active + 2 * 8192 * 4096 * 80) / 540e12)
    seconds = {c.name: c for c in sharded.collectives}
    assert seconds["target's layers gathered"].seconds == pytest.approx(4 * 80 * layer * 2 * 7 / 8 / 360e9)
    assert seconds["target's layers gathered"].exposed == 0  # 1.3 s under 19
    assert seconds["gradient summed"].exposed == pytest.approx(4 * trainable * 7 / 8 / 360e9)
    assert seconds["draft's weights gathered"].exposed == pytest.approx(2 * trainable * 7 / 8 / 360e9)
    assert sharded.step_s == pytest.approx(sharded.target_s + sharded.draft_s + 6 * trainable * 7 / 8 / 360e9)
    assert sharded.tokens_per_s == pytest.approx(4 * 16384 / sharded.step_s)

    # Over two hosts the slow link counts, and what it does not hide under the target's work is waited for.
    slow = fleet_planner(make_config(tmp_path, LLAMA_70B), Hardware(host_link=3.0))
    gathered = next(c for c in slow(Layout(16, holders=16)).collectives if "layers" in c.name)
    assert gathered.seconds == pytest.approx(2 * 80 * layer * 2 * 15 / 16 / 3e9)
    assert gathered.exposed == pytest.approx(gathered.seconds - sharded.target_s / 2)


def test_what_divides_on_the_other_axes(tmp_path):
    config = make_config(tmp_path, LLAMA_8B)
    planned = fleet_planner(config, Hardware())
    alone, sequence, tensor = planned(Layout(8)), planned(Layout(8, sequence=4)), planned(Layout(8, tensor=4))
    memory = [{row.name: row.size for row in p.memory} for p in (alone, sequence, tensor)]
    assert memory[1]["features g and f"] * 4 == memory[0]["features g and f"]
    # bf16 of this process's tokens (h0, its gradient, keys and values of its own), and of all tokens keys, values and their
    # fp32 gradients; of each of this process's tokens ids, mask, positions and three results a step.
    kept = 16384 // 4 * (2 * 4096 + 2048) * 2 + 16384 * 2048 * (2 + 4) + 16384 // 4 * (16 + 9 + 7 * (2 * 4 + 3))
    assert memory[1]["kept for every token of a pack"] == kept
    assert memory[2]["fp32 gradient"] * 4 == memory[0]["fp32 gradient"]
    for name in ("fp32 master weights", "fp32 moments (two)"):
        assert memory[2][f"{name}, 1/2"] * 4 == memory[0][f"{name}, 1/8"] * 4
    n, kv, packs = 16384, 2 * 8 * 128, 32 / 2
    seconds = [{c.name: c.seconds for c in p.collectives} for p in (alone, sequence, tensor)]
    assert seconds[1]["target's keys and values gathered"] == pytest.approx(packs * 32 * kv * n * 2 * 3 / 4 / 360e9)
    assert seconds[1]["draft's keys, values and their gradients"] == pytest.approx(packs * kv * n * 6 * 3 / 4 / 360e9)
    assert seconds[2]["sums over the tensor axis"] == pytest.approx(packs * n * 4 * 7 * 4096 * 2 * 2 * 3 / 4 / 360e9)
    assert {name for s in seconds for name in s} - seconds[0].keys() == {
        "target's keys and values gathered",
        "draft's keys, values and their gradients",
        "sums over the tensor axis",
    }


def test_who_shares_a_stored_pack_reads_all_of_it_and_keeps_its_own(tmp_path):
    config = make_config(tmp_path, LLAMA_8B, features={"path": str(tmp_path), "mode": "read"})
    planned = fleet_planner(config, Hardware())
    alone, shared = ({row.name: row.size for row in planned(Layout(n, sequence=n)).memory} for n in (1, 4))
    assert alone["features g and f"] == 4 * 4096 * 16384 * 2
    assert shared["features g and f"] == alone["features g and f"] * 5 // 4
    assert shared["target's embedding and head"] == 2 * 128256 * 4096 * 2 and "target weights" not in shared


def test_muon_is_planned_in_every_layout(tmp_path):
    """Of Llama-3.1-8B's draft, by hand: the products of a whole, and what goes to those who have the other parts."""
    planned = fleet_planner(make_config(tmp_path, LLAMA_8B, optim={"packs_per_step": 32, "optimizer": "muon"}), Hardware())
    of = {
        name: s for s, names in ((14336, "gate up down"), (12288, "fc"), (8192, "q"), (4096, "o")) for name in names.split()
    }
    flops = {name: 5 * 2 * 4096**2 * (2 * long + 4096) for name, long in of.items()}
    flops |= dict.fromkeys("kv", 5 * 2 * 1024**2 * (2 * 8192 + 1024))
    elements = 4096 * sum(of.values()) + 2 * 1024 * 8192

    alone, two, four = (planned(Layout(t, tensor=t)) for t in (1, 2, 4))
    assert alone.muon_s == pytest.approx(sum(flops.values()) / 540e12)
    # The costliest first, to whoever has least: down, o, k and v are one's of two; of four one has fc and q.
    assert two.muon_s == pytest.approx((flops["gate"] + flops["fc"] + flops["q"]) / 540e12)
    assert four.muon_s == pytest.approx((flops["fc"] + flops["q"]) / 540e12)
    for plan, n in ((two, 2), (four, 4)):
        seconds = {c.name: c.seconds for c in plan.collectives}
        assert seconds["Muon's matrices joined and taken apart"] == pytest.approx(
            2 * 2 * elements / n * (n - 1) / n / 360e9
        )
        assert "Muon's directions gathered" not in seconds
        assert plan.step_s == pytest.approx(plan.target_s + plan.draft_s + plan.muon_s + sum(seconds.values()))
    row = "Muon's directions and temporaries"
    assert {r.name: r.size for r in alone.memory}[row] == 2 * (3 * 14336 * 4096 + 2 * 14336 * 4096)  # a step in fp32
    assert all(2 * elements < {r.name: r.size for r in plan.memory}[row] < 4 * elements for plan in (two, four))
    assert "Muon's directions gathered" in {c.name for c in planned(Layout(8, tensor=2)).collectives}


def test_a_draft_of_blocks_shares_the_keys_of_all_its_layers(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)  # which names the mask token
    draft = {"method": "dflash", "overrides": {"num_hidden_layers": 5}}
    planned = fleet_planner(make_config(tmp_path, LLAMA_8B, draft=draft), Hardware())
    alone, shared = planned(Layout(8)), planned(Layout(8, sequence=4))
    assert shared.draft_s == pytest.approx(alone.draft_s)
    n, kv, packs = 16384, 5 * 2 * 8 * 128, 32 / 2
    seconds = {c.name: c.seconds for c in shared.collectives}
    assert seconds["draft's keys, values and their gradients"] == pytest.approx(packs * kv * n * 6 * 3 / 4 / 360e9)
    rows = {row.name: row.size for row in shared.memory}
    # bf16 of this process's tokens (fc's output, what the product for keys and values gave), and of all tokens keys, values
    # and their fp32 gradients; of each drafted token of a block three results.
    kept = n // 4 * (4096 + kv) * 2 + n * kv * 6 + n // 4 * 15 * (2 * 4 + 3)
    assert rows["kept for every token of a pack"] == kept
    # of five layers of the target and its last, in bf16, of this process's tokens
    assert rows["features g and f"] == (5 + 1) * 4096 * n // 4 * 2
    with pytest.raises(ValueError, match=r"dist\.tensor=2: the weights of a DFlash draft are not divided"):
        planned(Layout(8, tensor=2))


@pytest.mark.parametrize(
    "layout, sentence",
    [
        (Layout(6, sequence=4), "dist.sequence=4 and dist.tensor=1 need a multiple of 4 processes, not 6"),
        (
            Layout(64),
            "optim.packs_per_step=32 is not a multiple of the 64 groups of processes that have packs of their own "
            "(64 processes, dist.sequence=1, dist.tensor=1); set it to 64 or a multiple of that",
        ),
        (Layout(16, tensor=16), "dist.tensor=16 does not divide the draft's num_key_value_heads 8; set dist.tensor to"),
        (Layout(2, sequence=2), "because it has layers of sliding_attention"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(tmp_path, layout, sentence):
    facts = GPT_OSS_120B if layout.world == 2 else LLAMA_8B
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fleet_planner(make_config(tmp_path, facts), Hardware())(layout)


MEASURED = Path(__file__).parents[2] / "bench/results/fleet.jsonl"
LONG = {"max_position_embeddings": 1 << 20}
# Of each part of bench/fleet.py: the target, its pack and packs, how n GPUs share it, and which time of a plan it measures.
PARTS = {
    "data": (LLAMA_8B, 4096, 16, {}, lambda p: p.step_s),
    "sequence": (LLAMA_8B, 131072, 1, {"sequence": 1}, lambda p: p.draft_s + exposed(p, "draft's keys")),
    "capture": (LLAMA_8B, 131072, 1, {"sequence": 1}, lambda p: p.target_s + exposed(p, "target's keys")),
    "tensor": (LLAMA_8B, 8192, 1, {"tensor": 1}, lambda p: p.draft_s + exposed(p, "sums over")),
    "target": (LLAMA_70B, 16384, 0, {"holders": 1}, lambda p: p.target_s + exposed(p, "target's layers")),
}
# What a prediction may be off: of one GPU's time, and of how often as fast several are. The sums over the tensor axis are
# many and small, so that they reach less than a link's rate, and one GPU's part of the products is narrow.
TIME, RATIO = 0.20, {"tensor": 0.10}
HOST_BOUND = {("tensor", 4)}  # 701 launches took a host longer than the GPUs' work; a plan counts no host's work


def exposed(plan: fleet.FleetPlan, name: str) -> float:
    return sum(c.exposed for c in plan.collectives if c.name.startswith(name))


def predicted(folder: Path, part: str, gpus: int) -> fleet.FleetPlan:
    facts, tokens, packs, shared, _ = PARTS[part]
    data = {"paths": ["chats.jsonl"], "max_length": tokens, "pack_tokens": tokens}
    config = make_config(folder, facts | LONG, data=data, optim={"packs_per_step": packs or gpus, "optimizer": "adamw"})
    return fleet_planner(config, Hardware())(Layout(gpus, **{axis: gpus for axis in shared}))


def measured(part: str) -> dict[int, dict]:
    """The newest row of each number of GPUs."""
    lines = (json.loads(line) for line in MEASURED.read_text().splitlines())
    rows = {row["gpus"]: row for row in lines if row["op"] == "fleet" and row["part"] == part}
    assert {1, 2} <= rows.keys()
    return rows


def test_memory_is_what_was_measured(tmp_path):
    """Of whole training steps on GPUs with packs of their own: slices on their way, and what the target runs in."""
    for gpus, row in measured("data").items():
        assert predicted(tmp_path, "data", gpus).memory_bytes / GIB == pytest.approx(row["peak_gib"], rel=0.04), gpus


@pytest.mark.parametrize("part", PARTS)
def test_predictions_agree_with_what_was_measured(tmp_path, part):
    """One GPU ran 8 of the 70B's 80 layers, and its row is scaled to all."""
    seconds = PARTS[part][-1]
    for gpus, row in measured(part).items():
        of_layers = 10 if part == "target" and gpus == 1 else 1
        ours = seconds(predicted(tmp_path, part, gpus))
        assert ours == pytest.approx(of_layers * row["seconds"], rel=TIME + (0.02 if gpus > 1 else 0)), gpus
        if gpus > 1:
            share = 1 if part == "target" else gpus
            ratio = row["ratio_to_one"] / share
            efficiency = seconds(predicted(tmp_path, part, 1)) / ours / share
            if (part, gpus) in HOST_BOUND:
                assert efficiency > ratio
            else:
                assert efficiency == pytest.approx(ratio, abs=RATIO.get(part, 0.04)), gpus


def test_a_document_that_processes_share_takes_no_less_work(tmp_path):
    data = {"paths": ["chats.jsonl"], "max_length": 131072, "pack_tokens": 131072}
    config = make_config(tmp_path, LLAMA_8B | LONG, data=data, optim={"packs_per_step": 1, "optimizer": "adamw"})
    alone, shared = (fleet_planner(config, Hardware())(layout) for layout in (Layout(1), Layout(4, sequence=4)))
    assert shared.draft_s == pytest.approx(alone.draft_s / 4) and shared.target_s == pytest.approx(alone.target_s / 4)


def test_who_may_hold_a_target():
    assert [list(fleet.holder_choices(*x)) for x in ((32, 8), (4, 8), (12, 8), (1, 8), (24, 8))] == [
        [8, 16, 32],
        [4],
        [12],
        [],
        [8, 24],
    ]


def test_the_command_says_which_layout_fits(tmp_path, fastdraft):
    for facts, world, fits in ((LLAMA_70B, 8, True), (QWEN3_235B, 8, False), (GPT_OSS_120B, 8, True)):
        config = make_config(tmp_path, facts)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        code, out, _ = fastdraft("train", tmp_path / "run.yaml", "--plan", "--world", world)
        assert code == 0 and ("Layouts that fit" in out) == fits == ("no layout of 8 GPUs fits" not in out)
    assert "waits for links" in out and "1/8" in out
    code, out, _ = fastdraft("train", tmp_path / "run.yaml", "--plan", "--world", 8, "--link", 1, "--gpu-gib", 141)
    assert code == 0 and "8 GPUs of 141 GiB" in out and "moves 1 GB/s within" in out
    said = refusal(fastdraft("train", tmp_path / "run.yaml", "--world", 8))
    assert "--world belongs to --plan" in said
    assert "--link belongs to --world" in refusal(fastdraft("train", tmp_path / "run.yaml", "--plan", "--link", 9))
    said = refusal(fastdraft("train", tmp_path / "run.yaml", "dist.tensor=3", "--plan", "--world", 8))
    assert "dist.tensor=3 need a multiple of 3 processes, not 8" in said


@pytest.mark.parametrize(
    ("row", "facts", "world", "layout"),
    [
        ("| Llama 70B | 8 | target 1/8 | {} |", LLAMA_70B, 8, []),
        ("| Llama 405B | 32 | target 1/32 | {};", LLAMA_405B, 32, []),
        ("; with `dist.sequence=2 dist.tensor=4` {} |", LLAMA_405B, 32, ["dist.sequence=2", "dist.tensor=4"]),
        ("| Qwen3-235B-A22B | 8 | target 1/8 | {} |", QWEN3_235B, 8, []),
        ("| gpt-oss-120b in bfloat16 | 8 | target 1/8 | {} |", GPT_OSS_120B, 8, []),
    ],
)
def test_the_page_on_large_targets_says_what_is_predicted(tmp_path, fastdraft, row, facts, world, layout):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(make_config(tmp_path, facts).model_dump(mode="json")))
    code, out, _ = fastdraft("train", tmp_path / "run.yaml", *layout, "--plan", "--world", world)
    says, gib = re.search(r"total, which (fits|does not fit) in 80 GiB [^│]*│ *([\d.]+) ", out).groups()
    told = f"{float(gib):.0f}" + ("" if says == "fits" else ", too much")
    assert code == 0 and row.format(told) in Path("docs/large-targets.md").read_text()


def test_a_process_holds_what_is_predicted(target_dir):
    assert by_ranks(2, _hold, target_dir) == [0] * 2


def _hold(folder: Path) -> None:
    device = mesh.start_process("cpu")
    target = load_target(str(folder), torch.bfloat16, device, holders=mesh.holders(2))
    held = sum(local(p).nbytes for p in target.model.parameters())
    sizes = target_sizes(target.model.config.to_dict())
    assert held == (sizes.outside + sizes.layers // 2) * 2 and sizes.total * 2 < 2 * held < GIB
