"""Prompts to be answered, and their token ids by the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastdraft.data.config import TEMPLATE_DATE, with_date
from fastdraft.data.conversations import BadLine, parse, read_lines


class Prompt(NamedTuple):
    """A conversation up to the turn to be answered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # the functions on offer


def read_prompts(path: Path) -> list[Prompt]:
    """The conversations of a file up to the turn to be answered: messages, ShareGPT's conversations, or `prompt` alone.

    ValueError: FILE:LINE and what is wrong there; an unreadable or empty file.
    """
    prompts = []
    for line in read_lines(str(path)):
        conversation = parse(line, prompts=True)
        messages = list(conversation.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadLine(line.where, "nothing to answer: no turn before the last answer, or token ids")
        prompts.append(Prompt(messages, conversation.tools))
    return prompts


def prompt_ids(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, template_date: str = TEMPLATE_DATE, **template_kwargs: Any
) -> list[list[int]]:
    """Token ids of each prompt, ready for the assistant's turn. Raises ValueError when the chat template refuses one."""
    options = {"tokenize": False, "add_generation_prompt": True, **template_kwargs}

    def render(prompt: Prompt) -> str:
        template = with_date(tokenizer.get_chat_template(tools=prompt.tools), template_date)
        return tokenizer.apply_chat_template(prompt.messages, tools=prompt.tools, chat_template=template, **options)

    try:
        texts = [render(prompt) for prompt in prompts]
    except Exception as error:  # a template runs any expression: TypeError, KeyError, its own raise_exception ...
        raise ValueError(f"the chat template refuses a prompt: {type(error).__name__}: {error}") from error
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are structure and no text."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
