"""Prompts to be answered, and their token ids by the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastdraft.data.config import TEMPLATE_DATE, with_date
from fastdraft.data.conversations import BadLine, parse, read_lines, spellings
from fastdraft.data.template import ChatTemplate, Refused


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
    """Token ids of each prompt, ready for the assistant's turn, rendered as training data is: contents as lists of parts
    where the template shows text in no other form, reasoning under every name, a call's arguments as text where the
    template refuses the object. Raises ValueError when the chat template refuses a prompt."""
    kwargs = {**tokenizer.special_tokens_map, **template_kwargs}
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None  # rendering asks for none
    templates: dict[bool, ChatTemplate] = {}  # by whether there are tools, for which some tokenizers have another one

    def render(prompt: Prompt) -> str:
        asks = prompt.tools is not None
        if asks not in templates:
            templates[asks] = ChatTemplate(
                with_date(tokenizer.get_chat_template(tools=prompt.tools), template_date), kwargs, backend
            )
        for messages in spellings(prompt.messages):
            try:
                return templates[asks].render(messages, prompt.tools, add_generation_prompt=True)
            except Refused as error:
                refusal = error
        raise refusal

    try:
        texts = [render(prompt) for prompt in prompts]
    except Refused as error:
        raise ValueError(str(error).replace("refuses it", "refuses a prompt", 1)) from error
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are structure and no text."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
