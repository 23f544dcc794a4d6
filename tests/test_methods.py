"""A second draft method behind the same commands: what the seam of a method must carry, and that it carries it.

The method is a toy, a linear map from one layer's state to the token after the next, with its own shape, step, drafter and
serving format. Nothing in fastdraft knows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from small_runs import losses
from tiny import refusal, write_chats
from torch import nn

from fastdraft.batch import Rows, StepWeights
from fastdraft.model import methods
from fastdraft.model.method import Findings, Method, Row
from fastdraft.model.proposal import Proposals
from fastdraft.model.target_config import language_config, read_json, read_target_config


class LinearShape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    architecture: ClassVar[str] = "LinearDraft"

    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layers: tuple[int, ...] = (5,)
    initializer_range: float = 0.02

    @classmethod
    def from_target(cls, facts, /, **changes):
        facts = language_config(facts)
        width, vocab = facts["hidden_size"], facts["vocab_size"]
        return cls(**dict(hidden_size=width, target_hidden_size=width, vocab_size=vocab, draft_vocab_size=vocab) | changes)

    @classmethod
    def init_config(cls, target):
        return yaml.safe_dump(cls.from_target(read_target_config(target)).model_dump(mode="json"))

    def num_parameters(self):
        return {"trainable": self.vocab_size * self.hidden_size, "embedding": 0}

    def to_serving(self, dtype):
        return {"architectures": ["LinearDraft"], "dtype": str(dtype), **self.model_dump(mode="json")}


class LinearDraft(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def trainable(self):
        return dict(self.named_parameters())

    def frozen(self):
        return {}

    def init_weights(self, std, generator):
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(self.proj.weight.shape, generator=generator) * std)

    def take_from_target(self, embedding):
        pass


class LinearStep:
    """Row t: the draft reads g_t and is compared with the target's distribution after the token t + 1."""

    def __init__(self, config, draft, head, device):
        self.draft, self.head = draft, head

    def begin(self, number):
        pass

    def step(self, batch, features, grads):
        with torch.enable_grad():
            rows, total = self._rows(batch, features)
            if total.requires_grad:
                grads["proj.weight"] += torch.autograd.grad(total, self.draft.proj.weight)[0]
        return rows

    def rows(self, batch, features):
        return self._rows(batch, features)[0]

    def _rows(self, batch, features):
        t = torch.arange(batch.num_tokens - 2)
        inside = t + 2 < batch.doc_end[t]
        live = F.pad(inside & batch.loss_mask[2:], (0, 2))
        logits = self.draft.proj(features.g.to(self.draft.proj.weight.dtype))
        teacher = self.head.logits(features.f.roll(-1, 0)).float().softmax(-1)
        log_q = logits.float().log_softmax(-1)
        loss = -(teacher * log_q).sum(-1) * live
        acceptance = torch.minimum(teacher, log_q.exp()).sum(-1) * live
        hit = (logits.argmax(-1) == teacher.argmax(-1)) & live
        rows = Rows(*(x.detach()[None] for x in (loss, acceptance, hit, live, live)))
        return rows, loss.sum()


class LinearDrafter:
    def __init__(self, draft, head, batch, capacity):
        self.draft, self.draft_ids = draft, torch.arange(draft.config.vocab_size)

    def propose(self, token_ids, g, counts, depths, settings, generators):
        last = g[torch.arange(len(g)), torch.tensor(counts) - 1]
        best = self.draft.proj(last.to(self.draft.proj.weight.dtype)).argmax(-1)
        parents = torch.arange(max(depths)).repeat(len(g), 1)
        return Proposals(best[:, None].repeat(1, max(depths)), parents, depths)

    def select(self, rows):
        pass


def load(path, target):
    config = read_json(Path(path) / "config.json")
    draft = LinearDraft(LinearShape(**{name: config[name] for name in LinearShape.model_fields}))
    draft.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return draft


def verify(config, path, target_dir):
    theirs = language_config(read_target_config(target_dir))["vocab_size"]
    ours = config["vocab_size"]
    return Findings([] if ours == theirs else [f"vocab_size is {ours}, the target's {theirs}."], [])


LINEAR = Method(
    shape=LinearShape,
    draft=LinearDraft,
    build_step=LinearStep,
    fit=lambda draft, settings, ends, counts: ["the linear draft takes nothing from its target"],
    step_cost=lambda shape, *, pack_tokens, **more: (
        (Row("logits", 4 * pack_tokens * shape.vocab_size),),
        (Row("the product", 6 * shape.hidden_size * shape.vocab_size),),
    ),
    pair_cost=lambda shape, target_used, config: 0.0,
    drafter=LinearDrafter,
    serving_tensors=lambda draft, dtype: {"proj.weight": draft.proj.weight.detach().cpu().to(dtype)},
    load=load,
    verify=verify,
    step_weights=lambda config, shape: StepWeights(torch.ones(1), torch.ones(1), torch.ones(1)),
    check_config=lambda config: None,
    engine_names={},
)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "linear", LINEAR)


@pytest.fixture
def run_yaml(tree, tmp_path) -> Path:
    tree["draft"] = {"method": "linear"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def test_a_second_method_goes_through_the_unchanged_commands(linear, run_yaml, target_dir, tmp_path, runs):
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 4, turns=1)
    assert "vocab_size" in runs("init", target_dir, "--method", "linear")
    assert "the product" in runs("train", run_yaml, "--plan")
    assert "takes nothing from its target" in runs("train", run_yaml, "max_steps=60", "optim.lr=0.02")
    records = losses(run)
    assert records[-2]["loss"] < records[0]["loss"] - 0.2 and "a0" in records[0] and "a1" not in records[0]

    stopped = tmp_path / "stopped"  # goes on from a checkpoint of half the steps, and ends where the whole run did
    runs("train", run_yaml, f"run_dir={stopped}", "checkpoint.keep=9")
    for step in (6, 4):
        for path in (stopped / "checkpoints").glob(f"step-*{step}"):
            path.rename(path.with_name(f"aside-{step}"))
    whole = losses(stopped)
    assert "going on from" in runs("train", run_yaml, f"run_dir={stopped}", "checkpoint.keep=9")
    assert losses(stopped) == whole

    report = json.loads(runs("evaluate", run, "--prompts", prompts, "--max-prompts", 2, "--max-new-tokens", 12))
    assert report["held_out"]["overall"]["tau_sim"] > 1 and report["decode"]["num_equal"] == 2
    runs("export", run, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"proj.weight"}
    runs("check", "--checkpoint", tmp_path / "out", "--target", target_dir)
    runs("train", run_yaml, f"draft.init_from={tmp_path / 'out'}", f"run_dir={tmp_path / 'warm'}")
    runs("features", "capture", run_yaml, tmp_path / "store")
    runs("train", run_yaml, f"features.path={tmp_path / 'store'}", f"run_dir={tmp_path / 'from_store'}")


def test_a_method_that_is_none_is_refused(run_yaml, fastdraft):
    line = refusal(fastdraft("train", run_yaml, "draft.method=medusa"))
    assert "draft.method 'medusa' is not one of eagle3" in line
