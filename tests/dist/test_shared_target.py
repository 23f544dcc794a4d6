"""Processes that share the tokens of a pack give the states that one process gives, each those of its own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import by_ranks
from tiny import save_target, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from fastdraft.batch import Batch, Features, PackShare
from fastdraft.dist import mesh
from fastdraft.target.hf import Target, load_target

PACKS = [(12, 3, 11, 1, 7), (61,), (3,), (8, 8, 8, 8), (100, 2, 50)]
WINDOW = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
    "qwen3": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4},
}


def make_batch(lengths: tuple[int, ...], seed: int = 1) -> Batch:
    n = sum(lengths)
    ids = torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones(n, dtype=torch.bool), lengths)


def same(ours: Features, whole: Features, share: PackShare, allowed: float) -> None:
    torch.testing.assert_close(ours.g, whole.g[share.rows], rtol=allowed, atol=allowed)
    torch.testing.assert_close(ours.f, whole.f[share.rows_and_halo], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("world", [2, 4])
def test_shared_rows_are_those_of_one_process(world):
    assert by_ranks(world, _share_packs) == [0] * world


def _share_packs() -> None:
    mesh.start_process("cpu")
    torch.set_num_threads(1)
    mesh.lay_out(sequence=mesh.world())
    axis = mesh.axis("sequence")
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = tiny_llama(rope_theta=100.0).to(dtype)
        whole, target = Target(model), Target(tiny_llama(rope_theta=100.0).to(dtype), sequence=axis)
        for lengths in PACKS:
            batch = make_batch(lengths)
            for halo in (0, 3, 40):  # the last is longer than a slice
                share = PackShare(batch.num_tokens, axis.rank, axis.size, halo)
                same(target.capture_share(batch, halo), whole.capture(batch), share, allowed)

    # Packs that differ are no pack that is shared, and where tokens are seen in ways that are not known none is.
    with pytest.raises(ValueError, match=r"\(dist\.sequence\) were given different packs"):
        target.capture_share(make_batch((9, 4), seed=mesh.rank()), 0)
    for kind, why in (
        ("phimoe", "its config has windows of \\[8\\] tokens, which its layers do not name when they attend"),
        ("gpt_oss", "it has layers of sliding_attention with sinks"),
        ("llama4_text", "it has layers of chunked_attention"),
        ("gemma2", "Gemma2Attention attends with softcap"),
    ):
        with pytest.raises(
            ValueError, match=rf"dist\.sequence=\d: .* cannot share .*, because {why}; set dist\.sequence=1"
        ):
            Target(with_windows(kind), sequence=axis)


def with_windows(kind: str):
    """A tiny model of a family whose layers, or some of them, see 8 tokens."""
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=8, num_attention_heads=4, vocab_size=96)
    more = dict(num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=2, max_position_embeddings=128)
    config = AutoConfig.for_model(kind, **small | more | WINDOW.get(kind, {"sliding_window": 8}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize("world", [2, 3])
def test_rows_that_see_a_window_are_shared(world):
    """Mistral's window is in every layer, Gemma 3's and Qwen 3's in some; documents are longer than it, and shorter."""
    assert by_ranks(world, _share_windows) == [0] * world


def _share_windows() -> None:
    mesh.start_process("cpu")
    torch.set_num_threads(1)
    mesh.lay_out(sequence=mesh.world())
    axis = mesh.axis("sequence")
    for kind in ("mistral", "gemma3_text", "qwen3"):
        whole, target = Target(with_windows(kind).double()), Target(with_windows(kind).double(), sequence=axis)
        assert whole.apart is not None and 8 in target.windows
        assert kind == "mistral" or None in target.windows
        for lengths in PACKS:
            batch = make_batch(lengths)
            share = PackShare(batch.num_tokens, axis.rank, axis.size, 3)
            same(target.capture_share(batch, 3), whole.capture(batch), share, 1e-9)


def test_a_sharded_target_is_shared(tmp_path):
    """Two groups of two share packs of different numbers, and all four hold the target."""
    folder = save_target(tmp_path)
    assert by_ranks(4, _share_with_a_part, folder) == [0] * 4


def _share_with_a_part(folder: Path) -> None:
    device = mesh.start_process("cpu")
    torch.set_num_threads(1)
    mesh.lay_out(sequence=2)
    axis, group = mesh.axis("sequence"), mesh.axis("data").rank
    whole = load_target(str(folder), torch.float32, device)
    target = load_target(str(folder), torch.float32, device, holders=mesh.holders(4), sequence=axis)
    for lengths in PACKS[group : 2 + 3 * group]:
        batch = make_batch(lengths, seed=group)
        share = PackShare(batch.num_tokens, axis.rank, axis.size, 3)
        same(target.capture_share(batch, 3), whole.capture(batch), share, 1e-4)
    target.meet()
