"""The target answers on this machine, by transformers' generate: for small targets; larger ones want a server.

Batches of prompts of like length; what a batch's prompts all begin with (the system prompt) is run once. On a CPU, a
decoding step runs its attention as one grouped matrix product per key/value head: PyTorch's fused kernel repeats K and V
for every query head and takes half of the step (SmolLM2-135M, batch 96, context 150, 2 cores: 0.43 s a step with it,
0.21 s with this).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, DynamicCache, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fastdraft.answers.dialogue import Dialogue, answer_message
from fastdraft.answers.job import Job, Sampling, Stopped
from fastdraft.data.config import TEMPLATE_DATE, checked_date, checked_template_kwargs, writes_date
from fastdraft.data.prompts import Prompt, prompt_ids, special_ids
from fastdraft.model.precision import DTYPES, Dtype, auto_line, bf16_is_slow, dtype_name, pick_dtype, slow_line
from fastdraft.target.hf import ANY_SHAPE, Target, cache_name, load_target, load_tokenizer
from fastdraft.target.identity import target_fingerprint

GROUPED = "fastdraft_grouped"


def answer_batch(
    target: Target,
    prompts: list[list[int]],  # token ids, ready for the assistant's turn
    max_new_tokens: int,
    **sampling: Any,  # of transformers' generate; what is not said comes from the target's generation_config.json
) -> list[list[int]]:
    """One answer to each prompt, its end-of-turn token included, unless max_new_tokens cut it off."""
    pad = min(target.eos_ids)
    width = max(len(prompt) for prompt in prompts)
    shared = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))  # noqa: RUF071 (of lists, not paths)
    ids, mask = [], []
    for prompt in prompts:  # padded after what all share, so that this is run once
        gap = width - len(prompt)
        ids.append(prompt[:shared] + [pad] * gap + prompt[shared:])
        mask.append([1] * shared + [0] * gap + [1] * (len(prompt) - shared))
    ids, mask = (torch.tensor(x, device=target.device) for x in (ids, mask))
    with torch.no_grad(), sdpa_kernel(ANY_SHAPE), _grouped_on_cpu(target):
        out = target.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{cache_name(target.model): _prefill(target, ids, mask, shared)},
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(target.eos_ids),
            **sampling,
        )
    return [_until_eos(row, target.eos_ids) for row in out[:, width:].tolist()]


class LocalTarget:
    """A loaded target as what answers a job. Batches are the same whatever was done before, so a run that was stopped
    ends with the answers of one that was not. ValueError: a target without chat template, settings it does not know."""

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int,
        template_date: str = TEMPLATE_DATE,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path!r} has no chat template: it cannot answer conversations")
        extra = sampling.extra_body or {}
        if unknown := extra.keys() - {"chat_template_kwargs"}:
            raise ValueError(
                f"--extra-body: {', '.join(sorted(unknown))} is for servers; --target knows chat_template_kwargs alone"
            )
        self.target, self.tokenizer, self.sampling, self.batch_size = target, tokenizer, sampling, batch_size
        self._template_kwargs = checked_template_kwargs(extra.get("chat_template_kwargs", {}))
        self._template_date = checked_date(template_date)
        self._special = special_ids(tokenizer)
        if sampling.temperature == 0:
            self._sampling = {"do_sample": False}
        else:
            self._sampling = sampling.chosen() and sampling.chosen() | {"do_sample": True}

    def settings(self) -> dict[str, Any]:
        """What decides the answers besides the sampling."""
        generation = self.target.model.generation_config
        names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
        dated = writes_date(str(self.tokenizer.chat_template))
        return {
            "backend": "transformers",
            "model": target_fingerprint(self.target),
            "dtype": dtype_name(self.target.dtype),
            "batch_size": self.batch_size,
            "generation_config": {name: getattr(generation, name, None) for name in names},
        } | ({"template_date": self._template_date} if dated else {})

    def about(self) -> str:
        where = f"{self.target.model.name_or_path} here in {dtype_name(self.target.dtype)}"
        return f"{where}, {self.batch_size} conversations at a time"

    def answer(self, job: Job) -> None:
        """Answers all that is to do, a batch at a time, shortest first. Stopped: on SIGINT or SIGTERM."""

        def stop(number: int, _frame: FrameType | None) -> None:
            raise Stopped(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            order = sorted(job.dialogues(), key=lambda d: (self._length(d), d.index))
            for batch in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
                if not all(job.has(dialogue) for dialogue in batch):
                    self._answer(job, batch)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory with --batch-size {self.batch_size}: lower it; {error}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _answer(self, job: Job, batch: list[Dialogue]) -> None:
        """All turns of a batch's conversations, one turn of all of them at a time."""
        going, number = [d for d in batch if d.wants_answer()], 0
        while going:
            prompts = {}
            for dialogue in going:
                try:
                    prompts[dialogue.index] = self._prompt(dialogue)
                except ValueError as error:
                    _fail(job, dialogue, error)
            going = [d for d in going if d.index in prompts]
            if not going:
                return
            torch.manual_seed(((self.sampling.seed or 0) + 1_000_003 * batch[0].index + number) % 2**63)
            answers = answer_batch(self.target, list(prompts.values()), self.sampling.max_new_tokens, **self._sampling)
            unfinished = []
            for dialogue, ids in zip(going, answers, strict=True):
                try:
                    message = answer_message({"content": self._text(ids)})
                except ValueError as error:
                    _fail(job, dialogue, error)
                    continue
                dialogue.take(message, "stop" if ids[-1] in self.target.eos_ids else "length", len(ids))
                job.turn(len(ids))
                if dialogue.wants_answer():
                    unfinished.append(dialogue)
                elif not job.has(dialogue):
                    job.answered(dialogue)
            going, number = unfinished, number + 1

    def _length(self, dialogue: Dialogue) -> int:
        """Characters before the first answer."""
        dialogue.wants_answer()
        return sum(len(message["content"]) for message in dialogue.messages)

    def _prompt(self, dialogue: Dialogue) -> list[int]:
        """ValueError: the template refuses it; a token that the target has not; no room for an answer."""
        prompt = Prompt(dialogue.messages, dialogue.tools)
        (ids,) = prompt_ids([prompt], self.tokenizer, self._template_date, **self._template_kwargs)
        if max(ids, default=0) >= self.target.vocab_size:
            raise ValueError(f"token id {max(ids)} is not in the target's vocabulary of {self.target.vocab_size}")
        most, new = getattr(self.target.config, "max_position_embeddings", None), self.sampling.max_new_tokens
        if most is not None and len(ids) + new > most:
            raise ValueError(
                f"{len(ids)} tokens before the answer leave no {new} of the target's {most}; lower --max-new-tokens"
            )
        return ids

    def _text(self, ids: list[int]) -> str:
        """ValueError for special tokens in an answer: they are structure that the text would lose."""
        ended = ids[-1] in self.target.eos_ids
        ids = ids[:-1] if ended else ids
        if special := [i for i in ids if i in self._special]:
            token = self.tokenizer.convert_ids_to_tokens(special[0])
            raise ValueError(f"the answer holds the special token {token}; a server with the model's parsers can read it")
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text if ended else text.rstrip("\ufffd")  # a character cut in its middle


def name_dtype(
    asked: str,
    device: torch.device,
    begun: dict[str, Any],  # settings of the regeneration that goes on, empty when there is none
) -> tuple[Dtype, list[str]]:  # the dtype, what to tell the user
    """What --dtype means: auto is what the answers were begun in, or else this machine's choice. ValueError: no dtype."""
    if asked not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {asked} is not one of auto, {', '.join(DTYPES)}")
    told = []
    before = next((name for name, dtype in DTYPES.items() if begun.get("dtype") == dtype_name(dtype)), None)
    dtype = pick_dtype(asked, device) if asked != "auto" or before is None else before
    if asked == "auto" and before is None and device.type == "cpu":
        told.append(auto_line(["--dtype"], device))
    elif dtype == "bf16" and bf16_is_slow(device):
        fix = "--fresh begins anew in fp32" if asked == "auto" else "leave it out, auto is fp32 here"
        told.append(slow_line(["--dtype"], fix))
    return dtype, told


def open_local(
    path: str,
    device: torch.device,
    dtype: Dtype,
    batch_size: int,
    trust_remote_code: bool,
    sampling: Sampling,
    template_date: str = TEMPLATE_DATE,
) -> LocalTarget:
    """A target loaded here that answers with these settings."""
    checked_date(template_date)  # before the target is loaded
    target = load_target(path, DTYPES[dtype], device, trust_remote_code=trust_remote_code)
    return LocalTarget(target, load_tokenizer(path, trust_remote_code), sampling, batch_size, template_date)


def _fail(job: Job, dialogue: Dialogue, error: ValueError) -> None:
    if not job.has(dialogue):
        job.failed(dialogue, str(error))


def _prefill(
    target: Target,
    ids: Tensor,  # [B, width]
    mask: Tensor,  # [B, width]
    shared: int,  # leading tokens that all rows have in common
) -> DynamicCache:
    """Keys and values of all but the last token, which generate runs itself.

    Left to generate, the prompt's forward ends in a matrix product of a strided slice with lm_head, for which PyTorch 2.13
    copies the weight once a row: 8 s for 128 prompts on 2 cores.
    """
    cache = DynamicCache(config=target.config)
    if shared:
        target.forward(ids[:1, :shared], cache)
        cache.batch_repeat_interleave(len(ids))
    if ids.shape[1] - 1 > shared:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        target.forward(ids[:, shared:-1], cache, positions[:, shared:-1], mask[:, :-1])
    return cache


def _until_eos(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    end = next((k + 1 for k, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[:end]


@contextmanager
def _grouped_on_cpu(target: Target) -> Iterator[None]:
    """Our attention while generating on a CPU with plain causal attention; whatever the model uses otherwise."""
    before = target.model.config._attn_implementation
    if target.device.type != "cpu" or before != "sdpa":
        yield
        return
    target.model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)


def _grouped_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, n, D]
    key: Tensor,  # [B, Hkv, L, D]
    value: Tensor,  # [B, Hkv, L, D]
    attention_mask: Tensor | None,  # [B, 1, n, L] added to the scores
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:  # [B, n, Hq, D]
    b, hq, n, d = query.shape
    if n > 1:  # the prompt
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=mask is None)
    hkv = key.shape[1]
    scores = (query.reshape(b, hkv, hq // hkv * n, d) @ key.transpose(-1, -2)).float()
    scores = scores.view(b, hkv, hq // hkv, n, -1) * (d**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        # A padding row sees nothing. The least number instead of -inf keeps NaN out of its softmax.
        scores += attention_mask[:, :, None].to(scores.dtype).clamp_min(torch.finfo(scores.dtype).min)
    p = scores.softmax(-1).to(query.dtype).view(b, hkv, hq // hkv * n, -1)
    return (p @ value).view(b, hq, n, d).transpose(1, 2), None


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
