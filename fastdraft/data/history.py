"""Renderings of every turn of a long conversation, without rendering all that is before each of them.

A template that rewrites earlier turns must be asked for each turn's prompt and answer as they were then, which takes time
quadratic in the number of turns: half a minute for a thousand. But what lies some questions back is rendered as it is in
the whole conversation. So a turn is rendered behind the conversation's first exchange and the last three questions, and
what comes before those is taken from one rendering of the whole.

That this gives the same text is not assumed. In every turn the oldest of these questions, and all up to the next one, must
be rendered as in the whole conversation. And of every kind of turn, by the roles and keys of the messages in it and around
it, the first and the last are rendered in full and compared. Any difference, and all turns are rendered in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdraft.data.marking import HOWS, mark_all
from fastdraft.data.template import ChatTemplate, Refused

LONG = 48  # messages; below that the checks cost more than they save
QUESTIONS_BACK = 3
CHECKS = 40  # more kinds of turns than half of this: rendering all is not much dearer

Renderings = dict[int, tuple[str, str]]  # by the turn's end: with the turn, and before it with the generation prompt


def long_renderings(
    template: ChatTemplate,
    messages: Sequence[dict],
    tools: list[dict] | None,
    ends: list[int],  # of turns: message numbers from 1
) -> Renderings:
    """Renderings of the turns for which a short one suffices; empty where that cannot be shown."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(messages) < LONG or len(users) < 2 * QUESTIONS_BACK:
        return {}
    try:
        return _checked(template, messages, tools, ends, users)
    except Refused:  # of a shortened conversation, or for good: rendering in full says which
        return {}


def _checked(
    template: ChatTemplate, messages: Sequence[dict], tools: list[dict] | None, ends: list[int], users: list[int]
) -> Renderings:
    whole = template.render(messages, tools)
    begins = _questions(template, messages, tools, whole)
    second, done, kinds = users[1], {}, {}
    if second not in begins:
        return {}
    head = whole[: begins[second]]
    for end in ends:
        before = [i for i in users if i < end - 1][-QUESTIONS_BACK:]
        oldest = before[0] if len(before) == QUESTIONS_BACK else 0
        if oldest <= second or not {oldest, before[1]} <= begins.keys():
            continue
        short = [*messages[:second], *messages[oldest:end]]
        full = template.render(short, tools)
        prompt = template.render(short[:-1], tools, add_generation_prompt=True)
        past = whole[begins[oldest] : begins[before[1]]]
        if not full.startswith(head + past) or not prompt.startswith(head + past):
            return {}
        kept = whole[: begins[oldest]]
        done[end] = kept + full[len(head) :], kept + prompt[len(head) :]
        kind = tuple((m["role"], tuple(sorted(m)), not m["content"].strip()) for m in messages[oldest:end])
        kinds.setdefault(kind, []).append(end)
    checks = sorted({end for kind in kinds.values() for end in (kind[0], kind[-1])})
    if len(checks) > CHECKS:
        return {}
    for end in checks:
        full = template.render(messages[:end], tools)
        prompt = template.render(messages[: end - 1], tools, add_generation_prompt=True)
        if done[end] != (full, prompt):
            return {}
    return done


def _questions(template: ChatTemplate, messages: Sequence[dict], tools: list[dict] | None, whole: str) -> dict[int, int]:
    """Where the texts of users begin in the rendering, those that begin with a word."""
    for how in HOWS:
        marks, marked, marked_tools = mark_all(messages, tools, how, template.tags)
        plain, places = marks.find(template.render(marked, marked_tools))
        if plain == whole and how.given:
            break
    else:
        return {}
    begins = {}
    for place in places:
        message = messages[place.leaf.message] if place.leaf.message >= 0 else None
        if message and message["role"] == "user" and message["content"].startswith(place.leaf.text):
            begins.setdefault(place.leaf.message, place.start)
    return begins
