"""Real vLLM runs a DFlash2 draft's layers as fastdraft does, and scores candidates as fastdraft does.

Its first model runner serves such a draft without the selector, which vLLM refuses and a child of ours lets through. Its
attention on a CPU rounds float32 inputs: states of a block, of plain DFlash too, are off by some thousandths. So where a
token differs, its logit must be that near to the best.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cases import engine_place
from drafting import One
from safetensors.torch import save_file
from test_decode import prompts
from tiny import tiny_llama

from fastdraft.batch import Batch
from fastdraft.decode import generate_plain
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.parity import PLAIN, UNSELECTED, read_selector_as
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.serving.export import export_draft, load_draft, verify
from fastdraft.target.hf import Target

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15}
STEPS, NEAR = 5, 5e-3  # of the largest logit


def train(folder: Path) -> Target:
    """A draft trained so little on its target's outputs that about half of its tokens are wrong, exported to a folder."""
    model = tiny_llama(0, **SHAPE)
    model.save_pretrained(folder / "target")
    changes = {"mask_token_id": 190, "block_size": STEPS + 1, "num_hidden_layers": 2, "layers": (1, 4, 6)}
    c = DFlash2Config.from_target(model.config.to_dict(), selector_rank=16, selector_top_k=8, **changes)
    target, draft = Target(model, c.layers), DFlash2Draft(c)
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    draft.take_from_target(target.embedding)
    texts = [(p, generate_plain(target, p, 40).tokens) for p in prompts()]
    ids = torch.cat([torch.tensor(p + out) for p, out in texts])
    mask = torch.cat([torch.arange(len(p) + len(out)) >= len(p) for p, out in texts])
    batch = Batch(ids.where(ids != 190, 189), mask, tuple(len(p) + len(out) for p, out in texts))
    features, draw = target.capture(batch), lambda batch, step: draw_anchors(batch, 64, 0, step)
    engine = BlockEngine(draft, target.head, SelectorLoss(gamma=4.0), draw, None, SelectorHead, ConvolutionMixer(draft))
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for step in range(1, 18):
        grads = flat_gradients(draft.trainable())
        engine.begin(step)
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    checkpoint = export_draft(draft, folder / "draft", torch.float32)
    assert not verify(checkpoint, folder / "target").errors
    return target


def some_edges() -> dict[str, torch.Tensor]:
    """What vLLM's selector is given: two blocks of three slots with four candidates each."""
    gen = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=gen)  # noqa: E731
    return {
        "predecessor_table": normal(20, 6),
        "successor_table": normal(20, 6),
        "candidate_ids": torch.randint(20, (2, 3, 4), generator=gen),
        "unary_logits": normal(2, 3, 4),
        "hidden": normal(2, 3, 6),
        "anchor_token_ids": torch.tensor([3, 7]),
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place, folder = engine_place("vllm", os.environ), tmp_path_factory.mktemp("case")
    target, edges = train(folder), some_edges()
    save_file(edges, folder / "edges.safetensors")
    paths = {
        "target": str(folder / "target"),
        "checkpoint": str(folder / "draft"),
        "edges": str(folder / "edges.safetensors"),
    }
    job = paths | {"prompts": prompts(), "max_new_tokens": 30, "num_steps": STEPS}
    (folder / "job.json").write_text(json.dumps(job))
    child = [place.python, Path(__file__).with_name("vllm_layers_child.py"), folder / "job.json", folder / "result.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, child)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return target, load_draft(folder / "draft", target.config), json.loads((folder / "result.json").read_text()), edges


def test_vllm_runs_the_layers_as_we_do(served):
    target, draft, found, _ = served
    draft.take_from_target(target.embedding)
    equal, near, total = {PLAIN: 0, UNSELECTED: 0}, 0, 0
    for prompt, output in zip(prompts(), found["outputs"], strict=True):
        assert output["tokens"] == generate_plain(target, prompt, 30).tokens
        ids = torch.tensor(prompt + output["tokens"])
        g = target.forward(ids[None])[0][0]
        for r in output["rounds"]:
            root, theirs = len(prompt) + r["after"] - 1, torch.tensor(r["drafted"])
            total += STEPS
            for reading in equal:
                drafter = One(SelectorDrafter(read_selector_as(draft, reading), target.head, 1, len(ids)))
                with torch.no_grad():
                    drafter.extend(g[:root])
                    logits = target.head.logits(drafter.block(ids[root : root + 1])[1:])
                equal[reading] += int((logits.argmax(-1) == theirs).sum())
                if reading == UNSELECTED:
                    below = logits.amax(-1) - logits.gather(1, theirs[:, None])[:, 0]
                    near += int((below <= NEAR * logits.abs().amax(-1)).sum())
    assert near == total > 150 and equal[UNSELECTED] > 0.97 * total
    assert equal[PLAIN] < 0.8 * total, "the convolutions change too little for this to be a test"


def test_vllm_scores_candidates_as_we_do(served):
    _, draft, found, edges = served
    scores = torch.tensor(found["scores"])  # [blocks, slots, candidate before, candidate]
    selector = draft.candidate_selector
    selector.predecessor_codebook.data, selector.successor_codebook.data = (
        edges["predecessor_table"],
        edges["successor_table"],
    )
    ids, k = edges["candidate_ids"], 4
    anchors = edges["anchor_token_ids"][:, None, None].expand(-1, 1, k)
    before = torch.cat([anchors, ids[:, :-1]], 1)  # [blocks, slots, candidate before]
    wide = lambda x: x[:, :, None].expand(-1, -1, k, -1)  # noqa: E731
    with torch.no_grad():
        ours = draft.scores(wide(edges["unary_logits"]), wide(ids), wide(edges["hidden"]), before)
    torch.testing.assert_close(ours, scores, rtol=1e-5, atol=1e-5)
