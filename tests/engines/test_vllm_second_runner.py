"""Real vLLM's second model runner drafts with an exported block draft, of every method, every token that fastdraft drafts.

The second runner is the one that vLLM chooses where Triton runs, on GPUs, and the only one for DSpark and DFlash2. On a CPU
it is started here with Triton's interpreter, which vLLM is told is a backend for CPUs. Two of vLLM's kernels are replaced:

    the walk over DFlash2's candidates does not run in the interpreter; a few lines of PyTorch walk on vLLM's own scores
    `rms_norm` of vLLM's build for CPUs norms with the first row of a weight that has one for each layer, so the context's
    keys of every layer are normed by the first layer's k_norm. It is called for each layer by itself, except where
    the test shows that `check` names the fault. The k_norms here are far apart, as they are after long training.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from block_cases import far_apart, make_block_case
from cases import engine_place

from fastdraft.serving.check import compare
from fastdraft.serving.engines import run_engine
from fastdraft.serving.export import load_draft

SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, sys, types

os.environ["TRITON_INTERPRET"] = "1"

from triton import backends

backends.backends["cpu"] = backends.Backend(compiler=None, driver=types.SimpleNamespace(is_active=lambda: True))


class Patches(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


def walk_in_pytorch(module):
    def sample(self, candidates, scores, num_reqs, positions, index, temperature, seeds, tokens, *rest):
        scores = scores.view(num_reqs, self.num_steps, self.top_k, self.top_k)
        for row in range(num_reqs):
            place = 0
            for step in range(self.num_steps):
                place = int(scores[row, step, place].argmax())
                tokens[row, step] = candidates[row, step, place]

    module.CandidateSampler.sample = sample


def norm_each_layer(module):
    def normalize(self, keys):
        normed = keys.new_empty(keys.shape)
        for out, k, weight in zip(normed, keys, self._k_norm_weights, strict=True):
            module.ops.rms_norm(out, k.contiguous(), weight, self._rms_norm_eps)
        return normed

    module.DFlashQwen3Model._normalize_context_k = normalize


PATCHES = {"vllm.v1.worker.gpu.spec_decode.dflash2.speculator": walk_in_pytorch}
sys.meta_path.insert(0, Patches())
"""
NORM_EACH_LAYER = 'PATCHES["vllm.model_executor.models.qwen3_dflash"] = norm_each_layer\n'
MIXED = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}
CASES = {
    "dflash": ("dflash", {"layers": (1, 4, 6)}),
    "dflash, one sliding layer": ("dflash", MIXED),
    "dspark": ("dspark", {"layers": (1, 4, 6)}),
    "dflash2": ("dflash2", {"layers": (1, 4, 6)}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {
        name: make_block_case(changes, tmp_path_factory.mktemp("case"), method, far_apart)
        for name, (method, changes) in CASES.items()
    }


def served(cases, folder, patches: str):
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE + patches)
    place = replace(engine_place("vllm", os.environ), pythonpath=str(folder))
    runs = [case.run for case in cases.values()]
    plain, *found = run_engine(place, [replace(runs[0], checkpoint=None), *runs], 900)
    return plain, dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def mended(cases, tmp_path_factory):
    return served(cases, tmp_path_factory.mktemp("mended"), NORM_EACH_LAYER)


@pytest.fixture(scope="module")
def unmended(cases, tmp_path_factory):
    return served({"dspark": cases["dspark"]}, tmp_path_factory.mktemp("unmended"), "")


def reported(case, plain, served):
    return compare(
        case.target, load_draft(case.checkpoint, case.target.config), case.run.prompts, served, plain, case.run.num_steps
    )


@pytest.mark.parametrize("name", CASES)
def test_vllm_drafts_what_we_draft(cases, mended, name):
    plain, found = mended
    report = reported(cases[name], plain, found[name])
    assert not report.errors, report.lines()
    (drafted,) = [line for line in report.facts if line.startswith("drafted tokens: ")]
    equal, total = (int(drafted.split()[place]) for place in (2, 4))
    assert equal == total > 100 and "near-ties" not in drafted
    rounds = found[name].num_rounds
    assert total / cases[name].run.num_steps == pytest.approx(rounds, abs=len(plain.outputs)), "rounds were not seen"
    assert 1.2 < found[name].accepted_length < 4, "a draft that is always right, or never, shows little"


def test_the_norm_of_vllms_build_for_cpus_is_named(cases, unmended):
    plain, found = unmended
    report = reported(cases["dspark"], plain, found["dspark"])
    assert report.errors[0].startswith(
        "norm: vllm drafts as with the context's keys of every layer normed by the first layer's"
    )
    assert "fault of vLLM's build for CPUs" in report.errors[0]
