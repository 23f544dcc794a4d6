"""Where the texts of a conversation lie in its rendering, by marks set into the texts.

Each text gets a pair of private-use characters of its own around it, inside its outer white space, so that a template that
trims finds nothing else to trim. What is between the pair in the rendering is that text, wherever the template has put it.
Marks must change nothing: taken out, the rendering must be the plain one. A template that looks at how a text begins or
ends sees a mark there, so there are several ways to set them, and the first that changes nothing is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_END_OF_THOUGHT = re.compile("(?<![`'\"“‘])</think>")  # not a quoted one
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Leaf:
    """A text of a message that a template renders, without outer white space."""

    message: int  # its index; -1: of the tools
    kind: str  # "content" | "reasoning" | "name", "arguments" (of a call) | "tools"
    text: str
    whole: str  # with the white space
    call: int = 0  # which of the message's calls


@dataclass(frozen=True)
class Occurrence:
    start: int  # in the rendering without marks, end exclusive
    end: int
    leaf: Leaf
    pair: str  # the mark at its beginning, which is this text's alone


@dataclass(frozen=True)
class How:
    """A way to set marks."""

    calls: bool  # also into names and arguments of calls
    tools: bool  # also into the tools
    inside: bool  # after a text's first character and before its last
    given: bool  # into all messages, or into the last only


HOWS = (
    How(True, True, False, True),
    How(True, False, False, True),
    How(False, False, False, True),
    How(False, False, True, True),
    How(True, False, False, False),
)
# What templates compare in a tool instead of writing it: a mark would change what they find.
COMPARED = ("type", "required", "enum")


class Marks:
    """Sets marks into texts and finds them again."""

    def __init__(self, how: How, tags: re.Pattern[str], taken: set[str]) -> None:
        self._how, self._tags = how, tags
        self._free = (chr(i) for i in range(0xF0000, 0x10FFFE) if chr(i) not in taken)
        self._of: dict[str, tuple[Leaf, str, bool]] = {}  # what a mark means: its text, its pair, whether it ends it
        self.unmarked: set[int] = set()  # messages with a text that is too short for these marks

    def message(self, message: dict, index: int) -> dict:
        marked = dict(message)
        if isinstance(message.get("content"), str):
            marked["content"] = "".join(
                self._text(leaf) if isinstance(leaf, Leaf) else leaf for leaf in pieces(message, index, self._tags)
            )
        for key in REASONING_KEYS:
            if isinstance(reasoning := message.get(key), str):
                marked[key] = self._string(reasoning, index, "reasoning")
        if self._how.calls and message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, index, i) for i, call in enumerate(message["tool_calls"])]
        return marked

    def tools(self, tools: list[dict] | None) -> list[dict] | None:
        return self._values(tools, -1, "tools") if self._how.tools and self._how.given else tools

    def _call(self, call: dict, index: int, number: int) -> dict:
        function = call.get("function", call)
        keys = {"name", "arguments"} & function.keys()
        function = {**function, **{key: self._values(function[key], index, key, number) for key in keys}}
        return {**call, "function": function} if "function" in call else function

    def _values(self, value: Any, index: int, kind: str, call: int = 0) -> Any:
        if isinstance(value, dict):
            return {
                k: v if k in COMPARED and kind == "tools" else self._values(v, index, kind, call) for k, v in value.items()
            }
        if isinstance(value, list):
            return [self._values(v, index, kind, call) for v in value]
        return self._string(value, index, kind, call) if isinstance(value, str) else value

    def _string(self, text: str, index: int, kind: str, call: int = 0) -> str:
        core = text.strip()
        return self._text(Leaf(index, kind, core, text, call)) if core else text

    def _text(self, leaf: Leaf) -> str:
        core, inset = leaf.text, int(self._how.inside)
        opened, ended = next(self._free, None), next(self._free, None)
        if ended is None or len(core) <= 2 * inset:
            self.unmarked.add(leaf.message)
            return leaf.whole
        self._of[opened], self._of[ended] = (leaf, opened, False), (leaf, opened, True)
        marked = f"{core[:inset]}{opened}{core[inset : len(core) - inset]}{ended}{core[len(core) - inset :]}"
        before = leaf.whole[: len(leaf.whole) - len(leaf.whole.lstrip())]
        return before + marked + leaf.whole[len(before) + len(core) :]

    def pairs(self, message: int) -> dict[str, Leaf]:
        """The texts of a message that have marks."""
        return {pair: leaf for mark, (leaf, pair, _) in self._of.items() if mark == pair and leaf.message == message}

    def find(self, rendered: str) -> tuple[str, list[Occurrence]]:
        """The rendering without marks, and the texts whose both marks are in it, in order."""
        places, opened, kept, at, removed = [], {}, [], 0, 0
        inset = int(self._how.inside)
        for match in _PRIVATE.finditer(rendered):
            if (meaning := self._of.get(match.group())) is None:
                continue  # a character of the data's
            leaf, pair, ends = meaning
            kept.append(rendered[at : match.start()])
            here = match.start() - removed
            at, removed = match.end(), removed + 1
            if not ends:
                opened[pair] = here - inset
            elif pair in opened:
                places.append(Occurrence(opened.pop(pair), here + inset, leaf, pair))
        kept.append(rendered[at:])
        return "".join(kept), sorted(places, key=lambda place: (place.start, place.end))


def private_characters(texts: Iterator[str]) -> set[str]:
    """Characters that marks must not be made of, because the data has them."""
    return {character for text in texts for character in _PRIVATE.findall(text)}


def strings(value: Any) -> Iterator[str]:
    """All texts in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def thought_end(message: dict) -> int:
    """Where the reasoning inside a content ends, behind its last </think>. 0 where the content only speaks of that tag: all
    are quoted, or the reasoning stands beside a content that begins with none."""
    content = message["content"]
    beside = message.get("reasoning_content") and not content.lstrip().startswith("<think>")
    if beside or not _END_OF_THOUGHT.search(content):
        return 0
    return content.rfind("</think>") + len("</think>")


def pieces(message: dict, index: int, tags: re.Pattern[str]) -> list[Leaf | str]:
    """A content cut at the tags that its template names: its texts, and between them tags and white space as they are."""
    content = message["content"]
    thought = thought_end(message)
    result, at = [], 0
    for start, end in [*(match.span() for match in tags.finditer(content)), (len(content),) * 2]:
        text = content[at:start]
        if core := text.strip():
            result.append(Leaf(index, "reasoning" if at < thought else "content", core, text))
        else:
            result.append(text)
        result.append(content[start:end])
        at = end
    return result


def own_leaves(message: dict, index: int, tags: re.Pattern[str]) -> list[Leaf]:
    """The texts of an assistant's turn that a template renders, calls left out."""
    leaves = [leaf for leaf in pieces(message, index, tags) if isinstance(leaf, Leaf)]
    reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    return ([Leaf(index, "reasoning", core, reasoning)] if (core := reasoning.strip()) else []) + leaves


def mark_all(
    messages: Sequence[dict], tools: list[dict] | None, how: How, tags: re.Pattern[str]
) -> tuple[Marks, list[dict], list[dict] | None]:
    """The conversation with marks in it, the last message last."""
    taken = private_characters(strings([list(messages), tools]))
    marks, last = Marks(how, tags, taken), len(messages) - 1
    marked = [marks.message(m, i) if how.given or i == last else m for i, m in enumerate(messages)]
    return marks, marked, marks.tools(tools)
