"""Runs in vLLM's own Python: serves drafts on token ids, offline and in this process, and writes down every token drafted.

    python vllm_child.py JOB.json RESULT.json

vLLM chooses its model runner as it does for a user: where Triton runs that is its second, which alone serves DSpark and
DFlash2, and elsewhere its first. Both are listened to.

Imports nothing of fastdraft. JOB.json holds a list of runs (`serving.engines.Run`), RESULT.json a list of what came
of them, one each (`Served`). One request runs at a time, so a proposal belongs to the tokens that are there when it is
made.
"""

import gc
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the proposer is wrapped in this process
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import vllm
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

proposals: list[list[int]] = []  # of the request that runs, newest last
_propose = SpecDecodeBaseProposer.propose
_set_draft_tokens = DraftTokensHandler.set_draft_tokens


def propose(self, *args, **kwargs):
    drafted = _propose(self, *args, **kwargs)
    proposals.extend(drafted.tolist())
    return drafted


def set_draft_tokens(self, input_batch, draft_tokens):  # of the second runner, whatever drafted them
    proposals.extend(draft_tokens.tolist())
    return _set_draft_tokens(self, input_batch, draft_tokens)


SpecDecodeBaseProposer.propose = propose
DraftTokensHandler.set_draft_tokens = set_draft_tokens


def main(job: str, result: str) -> None:
    with open(job, encoding="utf-8") as file:
        runs = json.load(file)
    served = [serve(run) for run in runs]
    with open(result, "w", encoding="utf-8") as file:
        json.dump(served, file)


def serve(run: dict) -> dict:
    longest = max(len(ids) for ids in run["prompts"])
    length = longest + run["max_new_tokens"] + run["num_steps"] + 1  # less would silently end the drafting early
    options = {}
    if run["checkpoint"] is not None:
        options["speculative_config"] = {
            "method": run["algorithm"],
            "model": run["checkpoint"],
            "num_speculative_tokens": run["num_steps"],
        }
    llm = LLM(
        model=run["target"],
        trust_remote_code=run["trust_remote_code"],
        dtype=run["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=False,  # they count the drafts
        max_model_len=length,
        max_num_batched_tokens=max(length, 512),  # a prompt is one forward
        max_num_seqs=1,
        seed=0,
        **options,
    )
    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=run["max_new_tokens"],
        ignore_eos=True,
        stop_token_ids=run["stop_ids"],
        detokenize=False,
    )
    outputs = []
    for number, ids in enumerate(run["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        tokens, rounds = [], []
        while engine.has_unfinished_requests():
            proposals.clear()
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                if proposals and not output.finished:
                    rounds.append({"after": len(tokens), "drafted": proposals[-1]})
        outputs.append({"tokens": tokens, "rounds": rounds})
    found = {
        "engine": "vllm",
        "version": vllm.__version__,
        "dtype": str(engine.vllm_config.model_config.dtype).removeprefix("torch."),
        "outputs": outputs,
        "accepted_length": None,
        "num_rounds": None,
    }
    if run["checkpoint"] is not None:
        counts = {m.name: m.value for m in llm.get_metrics() if m.name.startswith("vllm:spec") and hasattr(m, "value")}
        drafts, accepted = counts["vllm:spec_decode_num_drafts"], counts["vllm:spec_decode_num_accepted_tokens"]
        found["num_rounds"] = drafts
        found["accepted_length"] = 1 + accepted / drafts if drafts else None  # vLLM's own mean acceptance length
    del engine, llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
