"""Messages and tools that a chat template does not render, so that they are in no prompt.

Whether one is rendered is asked of the template: does the rendering change with it? Most show their text as it is, which is
looked for first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastdraft.data.template import ChatTemplate, Refused
from fastdraft.data.turns import Turn

SHORT = 16  # characters; texts below that may stand in a rendering by chance


def unrendered(
    template: ChatTemplate,
    messages: Sequence[dict],
    tools: list[dict] | None,
    turns: Mapping[int, Turn],  # by their ends: message numbers from 1
) -> Iterator[tuple[int, str]]:
    """The index of each given message before a turn that is not in that turn's prompt, and its kind; -1 of the tools."""
    ends = sorted(turns)
    asked = {}  # messages in question, and the end of the turn that follows each
    for i, message in enumerate(messages[: ends[-1]] if ends else ()):
        content = message["content"].strip()
        if content and message["role"] != "assistant":
            end = next(end for end in ends if end > i)
            if len(content) < SHORT or not _asks(turns[end], content):
                asked[i] = end
    if tools and ends:
        seen = "tools" in template.jinja and any(_asks(turns[ends[0]], _name(tool)) for tool in tools)
        before = messages[: ends[0] - 1]
        if not seen and _prompt(template, before, tools) == _prompt(template, before, None) is not None:
            yield -1, "lists of tools"
    if not asked:
        return
    words = {i: f"fastdraft-{i}-" for i in asked}
    changed = [_with(message, words.get(i, "")) for i, message in enumerate(messages)]
    shown = _prompt(template, changed[: ends[-1] - 1], tools) or ""
    for i, end in asked.items():
        if words[i] not in shown:
            before = messages[: end - 1]
            other = [*messages[:i], changed[i], *messages[i + 1 : end - 1]]
            if _prompt(template, before, tools) == _prompt(template, other, tools) is not None:
                yield i, f"messages with the role {messages[i]['role']!r}"


def _asks(turn: Turn, text: str) -> bool:
    return turn.text.rfind(text, 0, turn.span[0]) >= 0


def _prompt(template: ChatTemplate, messages: Sequence[dict], tools: list[dict] | None) -> str | None:
    try:
        return template.render(messages, tools, add_generation_prompt=True)
    except Refused:
        return None


def _with(message: dict, word: str) -> dict:
    return {**message, "content": message["content"] + word} if word else message


def _name(tool: dict) -> str:
    """A tool's name, which templates write as it is. Without one, a text that is in no rendering."""
    name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
    return name if isinstance(name, str) and name else "\0"
