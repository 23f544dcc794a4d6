"""Prompts to be answered: JSONL lines with `prompt` (one user message) or `messages`, to token ids by the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def read_prompts(path: Path) -> list[Messages]:
    """The conversations of a file up to the turn to be answered. Raises ValueError with file and line."""
    prompts: list[Messages] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        messages = row.get("messages") if isinstance(row, dict) else None
        if isinstance(prompt, str):
            prompts.append([{"role": "user", "content": prompt}])
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            prompts.append(messages)
        else:
            raise ValueError(f'{path}:{number}: needs "prompt" (text) or "messages" (a list with roles)')
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
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
