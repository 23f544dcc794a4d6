"""Runs in SGLang's own Python, on a GPU: serves drafts on token ids with its offline engine.

    python sglang_child.py JOB.json RESULT.json

The same files as vllm_child.py. SGLang drafts in another process and does not show what; it tells how many verifying
forwards each request took. Kernels that need no compiler and no CUDA graph, so that partial installs will do.
"""

import json
import sys

import sglang

RUNNING = 8  # requests at a time


def main(job: str, result: str) -> None:
    with open(job, encoding="utf-8") as file:
        runs = json.load(file)
    served = [serve(run) for run in runs]
    with open(result, "w", encoding="utf-8") as file:
        json.dump(served, file)


def serve(run: dict) -> dict:
    checkpoint, options = run["checkpoint"], {}
    if checkpoint is not None:
        options = {
            "speculative_algorithm": run["algorithm"],
            "speculative_draft_model_path": checkpoint,
            "speculative_num_steps": run["num_steps"],
            "speculative_eagle_topk": run["eagle_topk"],
            "speculative_num_draft_tokens": run["num_draft_tokens"] or run["num_steps"] + 1,
        }
    longest = max(map(len, run["prompts"]))
    engine = sglang.Engine(
        model_path=run["target"],
        trust_remote_code=run["trust_remote_code"],
        dtype=run["dtype"],
        skip_tokenizer_init=True,
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        max_running_requests=RUNNING,
        # a key-value cache for these requests and no more: others may use the GPU, too
        max_total_tokens=max(1 << 16, RUNNING * (longest + run["max_new_tokens"] + 256)),
        mem_fraction_static=0.6,
        random_seed=0,
        log_level="error",
        **options,
    )
    # no ignore_eos: it would switch stop_token_ids off as well
    sampling = {"temperature": 0.0, "max_new_tokens": run["max_new_tokens"], "stop_token_ids": run["stop_ids"]}
    answers = engine.generate(input_ids=run["prompts"], sampling_params=sampling)
    engine.shutdown()
    outputs = []
    for answer in answers:
        told = answer["meta_info"]
        # absent where the first token ended the output: then nothing was verified
        rounds = told.get("spec_verify_ct", 0) if checkpoint is not None else None
        outputs.append({"tokens": answer["output_ids"], "num_rounds": rounds})
    lengths = [a["meta_info"]["spec_accept_length"] for a in answers if "spec_accept_length" in a["meta_info"]]
    return {
        "engine": "sglang",
        "version": sglang.__version__,
        "dtype": run["dtype"],
        "outputs": outputs,
        "accepted_length": sum(lengths) / len(lengths) if lengths else None,  # mean of the requests' own numbers
        "num_rounds": None if checkpoint is None else sum(o["num_rounds"] for o in outputs),
    }


if __name__ == "__main__":  # SGLang's workers import this file again
    main(*sys.argv[1:])
