"""Prompts to be answered, and their token ids by the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.data.conversations import BadLine, parse, read_lines

Messages = list[dict[str, Any]]


def read_prompts(path: Path) -> list[Messages]:
    """The conversations of a file up to the turn to be answered: messages, ShareGPT's conversations, or `prompt` alone.

    ValueError: FILE:LINE and what is wrong there; an unreadable or empty file.
    """
    prompts = []
    for line in read_lines(str(path)):
        messages = list(parse(line, prompts=True).messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadLine(line.where, "nothing to answer: no turn before the last answer, or token ids")
        prompts.append(messages)
    return prompts


def prompt_ids(prompts: list[Messages], tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[list[int]]:
    """Token ids of each prompt, ready for the assistant's turn. Raises ValueError when the chat template refuses one."""
    try:
        texts = [
            tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True, **template_kwargs) for m in prompts
        ]
    except Exception as error:  # a template runs any expression: TypeError, KeyError, its own raise_exception ...
        raise ValueError(f"the chat template refuses a prompt: {type(error).__name__}: {error}") from error
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are structure and no text."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
