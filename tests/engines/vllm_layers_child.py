"""Runs in vLLM's own Python: a DFlash2 draft's layers in its first model runner, and its selector's scores by themselves.

    python vllm_layers_child.py JOB.json RESULT.json

vLLM refuses such a draft for the first runner, because that one has no selector. The refusal is taken out here, so that its
layers with their convolutions can be seen on a CPU, where the second runner does not start.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_dflash2 import _score_edges
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

proposals = []
_propose = SpecDecodeBaseProposer.propose


def propose(self, *args, **kwargs):
    drafted = _propose(self, *args, **kwargs)
    proposals.extend(drafted.tolist())
    return drafted


def serve(job: dict) -> list[dict]:
    VllmConfig._is_dflash_candidate_draft = lambda self: False
    SpecDecodeBaseProposer.propose = propose
    longest = max(map(len, job["prompts"]))
    llm = LLM(
        model=job["target"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_model_len=longest + job["max_new_tokens"] + job["num_steps"] + 1,
        max_num_batched_tokens=512,
        max_num_seqs=1,
        speculative_config={
            "method": "dflash",
            "model": job["checkpoint"],
            "num_speculative_tokens": job["num_steps"],
        },
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], ignore_eos=True, detokenize=False)
    outputs = []
    for number, ids in enumerate(job["prompts"]):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        tokens, rounds = [], []
        while llm.llm_engine.has_unfinished_requests():
            proposals.clear()
            for output in llm.llm_engine.step():
                tokens = list(output.outputs[0].token_ids)
                if proposals and not output.finished:
                    rounds.append({"after": len(tokens), "drafted": proposals[-1]})
        outputs.append({"tokens": tokens, "rounds": rounds})
    return outputs


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    edges = load_file(job["edges"])
    with torch.no_grad():
        scores = _score_edges(**edges, top_k=edges["candidate_ids"].shape[-1])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"scores": scores.tolist(), "outputs": serve(job)}, file)


if __name__ == "__main__":
    main()
