"""Lines of JSONL or rows of Parquet, in the shapes people keep chats in, to one normal form.

Shapes: OpenAI `messages` (with `tools`, `reasoning_content`, `tool_calls`), ShareGPT `conversations` (`from`/`value` or
`role`/`content`), pre-tokenised `input_ids` + `loss_mask`. JSONL is read here line by line and not through `datasets`,
whose Arrow typing gives every line the union of all lines' keys (wrong tool arguments) and no line numbers; Parquet by
pyarrow, which gives rows of chats seven times as fast (270 k/s of 100 words on one core).
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What ShareGPT files call the roles.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_call": "assistant",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles whose text is the JSON of calls
SHAPES = ("messages", "conversations", "input_ids")
MEDIA = {"image", "images", "img", "imgs", "pixel", "video", "videos", "audio", "audios"}  # words of keys
# Keys of a message that chat templates, servers or training read, so that none of them may be left out without a word.
READ_KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id", "weight", "finish_reason")
# Other trainers' keys of an assistant's message, which say by `false` that it is not trained on.
NOT_TRAINED = ("train", "trainable", "training", "loss", "loss_weight", "loss_scale", "loss_mask")
PREFIXED = ("prefix", "partial")  # APIs' keys of an assistant's message whose text the user wrote for the model to go on
# Keys of a line that change the prompt it was served with and are not read.
_FOR_ALL = "say it for all lines, in data.chat_template_kwargs or --extra-body, and take the key out"
CHANGES_PROMPT = {
    "chat_template_kwargs": _FOR_ALL,
    "reasoning_effort": _FOR_ALL,
    "enable_thinking": _FOR_ALL,
    "documents": "write them into a message, or take the key out",
    "continue_final_message": 'give the message that is gone on with "weight": 0, and take the key out',
}
SYSTEMS = ("system_prompt", "system_message", "instructions")  # what some call `system`, and others something else
CUT = ("length", "max_tokens", "model_length", "content_filter", "abort")  # reasons why an answer ends, not by the model
ENDED = ("finish_reason", "stop_reason", "done_reason")  # servers' keys of such a reason
REASONING_NAMES = ("reasoning", "thinking", "reasoning_text")  # other names of `reasoning_content`
REASONING_LISTS = ("reasoning_details", "thinking_blocks")  # and of reasoning in a list of objects
# Reasoning that has the tags of its block with it.
_ENCLOSED = re.compile(
    r"\s*(?:<(?P<tag>(?:\w+:)?think(?::\w+)?)>(?P<thought>.*)</(?P=tag)>|\[THINK\](?P<said>.*)\[/THINK\])\s*", re.DOTALL
)
NAMES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".parquet")  # ends of files' names


class BadLine(ValueError):
    """One line that cannot be used."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)  # both, so that it comes whole out of a worker process
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class KeyTwice(ValueError):
    """A JSON object whose value depends on the reader."""


@dataclass(frozen=True)
class Conversation:
    """Either messages (in the form chat templates read) with tools, or tokens with their mask."""

    where: str  # FILE:LINE, lines and Parquet rows counted from 1
    key: int  # 64-bit hash of the content
    messages: tuple[dict, ...] = ()
    tools: list[dict] | None = None
    input_ids: np.ndarray | None = None  # [L] int32
    loss_mask: np.ndarray | None = None  # [L] bool
    parts: dict[int, list[str]] = field(default_factory=dict)  # of a content that is `together` of several, by its index


@dataclass(frozen=True)
class Line:
    """A line of JSONL as bytes or a row of Parquet as a dict, not yet looked into."""

    where: str
    content: bytes | dict
    place: tuple[int, int] = (0, 0)  # what of its file is read with it: lines or rows; bytes, 0 in a Parquet file
    num_bytes: int = 0  # of a row, the mean of those around it


def expand(paths: list[str], urls: bool = False, setting: str = "") -> list[str]:
    """Files named by paths and glob patterns, in order; also URLs (`fsspec`'s: hf://, s3://, https://, ...) if asked.

    ValueError, which begins with the setting that has the paths: one that is missing, a folder, or of another kind.
    """
    files, of = [], f"{setting}: " if setting else ""
    for path in paths:
        if "://" in path:
            if not urls:
                raise ValueError(
                    f"{of}{path}: only data.streaming reads URLs; download the file, or set data.streaming=true"
                )
            found = _glob_url(path)
        else:
            path = os.path.expanduser(path)
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"{of}{path}: no such file, and none that matches it")
        for file in found:
            if os.path.isdir(file):
                raise ValueError(f"{of}{file} is a folder; name its files, for example {os.path.join(file, '*.jsonl')}")
            if not file.endswith(NAMES):
                kinds = "JSONL (.jsonl, .json, .ndjson, also with .gz) nor .parquet"
                raise ValueError(f"{of}{file}: neither {kinds} by its name")
            files.append(file)
    return files


def _glob_url(path: str) -> list[str]:
    try:
        files, _ = fsspec.core.url_to_fs(path)
        return sorted(files.unstrip_protocol(name) for name in files.glob(path))
    except (OSError, ValueError, ImportError) as error:  # a protocol that is unknown, or whose package is missing
        raise ValueError(f"{path}: cannot be listed: {error}") from error


def read_lines(path: str, place: tuple[int, int] = (0, 0)) -> Iterator[Line]:
    """Non-blank lines or rows of one file, after that place of a line (`Line.place`).

    ValueError for an unreadable or empty file.
    """
    empty = place == (0, 0)
    for line in _parquet_rows(path, place[0]) if path.endswith(".parquet") else _jsonl_lines(path, *place):
        empty = False
        yield line
    if empty:
        raise ValueError(f"{path}: empty, no conversation in it")


def _jsonl_lines(path: str, done: int, at: int) -> Iterator[Line]:
    try:
        with _open(path) as file:
            file.seek(at)
            for number, content in enumerate(file, done + 1):
                at += len(content)
                content = content.removeprefix(b"\xef\xbb\xbf")  # files with one may have been put behind each other
                if content.strip():
                    yield Line(f"{path}:{number}", content, (number, at), len(content))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _open(path: str) -> Any:  # a context manager of a binary file
    if "://" in path:
        return fsspec.open(path, "rb", compression="gzip" if path.endswith(".gz") else None)
    return (gzip.open if path.endswith(".gz") else open)(path, "rb")


def _parquet_rows(path: str, done: int) -> Iterator[Line]:
    before = 0  # rows of earlier batches
    try:
        with _open(path) as file:
            for batch in pa.parquet.ParquetFile(file).iter_batches(1000):
                rows = batch.slice(min(max(done - before, 0), len(batch))).to_pylist()
                before += len(batch)
                for number, row in enumerate(rows, before - len(rows) + 1):
                    yield Line(f"{path}:{number}", _without_nulls(row), (number, 0), batch.nbytes // len(batch))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Drop the null keys that Arrow's common struct type put into rows that never had them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def parse(line: Line, prompts: bool = False) -> Conversation:
    """The line's conversation in normal form. BadLine says what is wrong with it.

    With `prompts`, the line may also have `prompt`, which is short for one user's message.
    """
    try:
        return _conversation(line, prompts)
    except RecursionError as error:
        raise BadLine(line.where, "JSON nested too deeply") from error
    except UnicodeDecodeError as error:
        if error.object.startswith(b"\x1f\x8b"):
            raise BadLine(line.where, "gzip by its first bytes; end the file's name in .gz") from error
        if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BadLine(line.where, "UTF-16 by its first bytes; iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl") from error
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise BadLine(line.where, f"not UTF-8: {byte}") from error
    except UnicodeEncodeError as error:
        raise BadLine(line.where, "holds half of a surrogate pair, which is no character") from error
    except ValueError as error:
        array = isinstance(line.content, bytes) and line.content.lstrip().startswith(b"[")
        hint = "; if the file is one JSON array, write a conversation a line: jq -c '.[]' FILE > NEW.jsonl"
        raise BadLine(line.where, f"{error}{hint if array else ''}") from error


def _conversation(line: Line, prompts: bool) -> Conversation:
    row = line.content
    if isinstance(row, bytes):
        text = row.decode("utf-8")
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except KeyTwice:
            raise
        except ValueError as error:
            lines = "; if a JSON value goes over several lines, write it on one: jq -c . FILE > NEW.jsonl"
            raise ValueError(f"not JSON: {error}{lines if text.strip() == '{' else ''}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_kind(row)}")
    shapes = [name for name in SHAPES if row.get(name) is not None]
    if prompts and not shapes and isinstance(row.get("prompt"), str):
        shapes, row = ["messages"], row | {"messages": [{"role": "user", "content": row["prompt"]}]}
    if len(shapes) != 1:
        has = f"has {' and '.join(shapes)}" if shapes else f"has none (keys: {', '.join(map(str, row)) or 'none'})"
        known = [*SHAPES, "prompt (text)"] if prompts else SHAPES
        raise ValueError(f"expected exactly one of {', '.join(known[:-1])} or {known[-1]}; {has}")
    _refuse_media(row, "the line")
    for key, remedy in CHANGES_PROMPT.items():
        given = row.get(key)
        said = any(v is not None for v in given.values()) if isinstance(given, dict) else _says_something(given)
        said = said or (key == "enable_thinking" and given is False)
        if shapes != ["input_ids"] and said:  # `enable_thinking: false` says something, too
            raise ValueError(f"the line has {key!r} ({_kind(given)}), which is not read; {remedy}")
    if shapes == ["input_ids"]:
        return _tokens(line.where, row)
    name = "tools" if row.get("tools") or not row.get("functions") else "functions"  # as OpenAI called them first
    tools = _json_if_string(row.get(name) or None, name) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise ValueError(f"{name} must be a list of objects, got {_kind(tools)}")
    tools = tools and [_tool(tool) for tool in tools]
    _refuse_beyond_json(tools, "tools")
    turns = _json_if_string(row[shapes[0]], shapes[0])
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{shapes[0]} must be a non-empty list, got {_kind(turns)}")
    messages = [_message(turn, i, sharegpt=shapes == ["conversations"]) for i, turn in enumerate(turns, 1)]
    contents = [_texts(turn) for turn in turns]
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"system must be a string, got {_kind(system)}")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        contents.insert(0, [])
    for key in SYSTEMS:
        if messages[0]["role"] not in ("system", "developer") and _says_something(row.get(key)):
            raise ValueError(
                f"the line has {key!r} and no system turn; call it 'system' if it was served as one, or take the key out"
            )
    _take_finish_reasons(row, messages)
    texts = {i: texts for i, texts in enumerate(contents) if len(texts) > 1}
    parts = {i: t for i, t in texts.items() if messages[i]["content"] == together(t, messages[i]["role"])}
    return Conversation(line.where, _key([messages, tools]), tuple(messages), tools, parts=parts)


def _tool(tool: dict) -> dict:
    """A function on offer as servers take it, which refuse a bare one; templates render both, but not alike."""
    bare = "function" not in tool and isinstance(tool.get("name"), str) and tool.get("type") in (None, "function")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if bare else tool


def _take_finish_reasons(row: dict, messages: list[dict]) -> None:
    """Says in each answer why it ended, as `data regenerate` writes it for all together, and others for the last."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if (reason := _cut_by(row)) and answers:
        answers[-1]["finish_reason"] = reason
    if (reasons := row.get("finish_reasons")) is None:
        return
    if not isinstance(reasons, list) or len(reasons) != len(answers):
        counted = f"{len(reasons)} of them" if isinstance(reasons, list) else _kind(reasons)
        raise ValueError(
            f"finish_reasons must be a list with a reason for each of the {len(answers)} answers, got {counted}"
        )
    for message, reason in zip(answers, reasons, strict=True):
        if reason := _cut_by({"finish_reason": reason}):
            message["finish_reason"] = reason


def _cut_by(fields: dict) -> str | None:
    """Why not the model ended an answer, by a message's or a line's keys; SGLang has an object with a `type`."""
    reasons = (value.get("type") if isinstance(value := fields.get(key), dict) else value for key in ENDED)
    return next((reason.lower() for reason in reasons if isinstance(reason, str) and reason.lower() in CUT), None)


def _tokens(where: str, row: dict) -> Conversation:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if mask is None:
        raise ValueError("input_ids without loss_mask")
    for name, value in (("input_ids", ids), ("loss_mask", mask)):
        if not isinstance(value, list) or not all(isinstance(x, (int, np.integer)) for x in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {_kind(value)}")
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} input_ids but {len(mask)} loss_mask entries")
    if not ids:
        raise ValueError("input_ids is empty")
    if any(isinstance(x, bool) for x in ids):
        raise ValueError("input_ids holds true or false where a token id belongs")
    if min(ids) < 0 or max(ids) >= 2**31:
        raise ValueError(f"token id {min(ids) if min(ids) < 0 else max(ids)} is outside 0 .. 2^31 - 1")
    if min(mask) < 0 or max(mask) > 1:
        raise ValueError(f"loss_mask must be 0 or 1, got {min(mask) if min(mask) < 0 else max(mask)}")
    key = _key([ids, [int(x) for x in mask]])
    return Conversation(where, key, input_ids=np.array(ids, dtype=np.int32), loss_mask=np.array(mask, dtype=bool))


def _message(turn: Any, number: int, sharegpt: bool) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} must be an object, got {_kind(turn)}")
    names = {"from": "role", "value": "content"} if sharegpt else {}
    for key, name in names.items():
        if None not in (turn.get(key), turn.get(name)) and turn[key] != turn[name]:
            raise ValueError(f"message {number} has {key!r} and {name!r}, which differ; leave one of them")
    message = {names.get(k, k): v for k, v in turn.items() if v is not None}
    role = message.get("role")
    if not isinstance(role, str):
        hint = "; 'from' and 'value' are read in 'conversations'" if "from" in message and role is None else ""
        raise ValueError(f"message {number} needs a role, got {_kind(role)}{hint}")
    _refuse_media(message, f"message {number}")
    if sharegpt:
        message["role"] = SHAREGPT_ROLES.get(role, role)
        if role in CALLING:
            message = _function_call(message, number)
    if message["role"] not in ROLES:
        known = (*ROLES, *SHAREGPT_ROLES) if sharegpt else ROLES
        raise ValueError(f"message {number} has role {role!r}; known roles: {', '.join(known)}")
    if message.get("function_call") and "tool_calls" not in message:  # as OpenAI called them first
        message["tool_calls"] = [message.pop("function_call")]
    for key in NOT_TRAINED:
        if message["role"] == "assistant" and message.get(key) in (False, "false", "False"):  # 0, too
            said = json.dumps(message[key])
            raise ValueError(f'message {number} has {key!r}: {said}, which is not read; write "weight": 0 instead')
    for key in PREFIXED:
        given = message["role"] == "assistant" and message.get(key) in (True, "true", "True")  # 1, too
        if given and message.get("weight") != 0:
            raise ValueError(
                f"message {number} has {key!r}: {json.dumps(message[key])}, so its text was given to the model and not "
                'written by it; write "weight": 0 with it'
            )
    if message.get("train_detail"):
        raise ValueError(f"message {number} has 'train_detail', which is not read: only whole messages are left out")
    if reason := _cut_by(message):
        message["finish_reason"] = reason
    thinks = any(_says_something(message.get(key)) for key in ("reasoning_content", *REASONING_NAMES, *REASONING_LISTS))
    needed = "tool_calls" not in message and not (thinks and message["role"] == "assistant")
    message["content"] = _text(message.get("content"), message["role"], number, needed)
    _take_reasoning(message, number)
    if "tool_calls" in message:
        calls = _json_if_string(message["tool_calls"], f"message {number}: tool_calls")
        if not isinstance(calls, list):
            raise ValueError(f"message {number}: tool_calls must be a list, got {_kind(calls)}")
        message["tool_calls"] = [_tool_call(call, number) for call in calls]
        if not calls:
            del message["tool_calls"]
    for key in READ_KEYS:
        _refuse_beyond_json(message.get(key), f"message {number}: {key}")
    return {key: value for key, value in message.items() if _beyond_json(value) is None}


def _take_reasoning(message: dict, number: int) -> None:
    """Puts reasoning that has another server's name for it under `reasoning_content`."""
    for name in ("reasoning_content", *REASONING_NAMES):
        given = message.get(name)
        if given is not None and not isinstance(given, str) and (name == "reasoning_content" or _says_something(given)):
            raise ValueError(f"message {number}: {name} must be a string, got {_kind(given)}")
    for name in REASONING_NAMES:
        given, taken = message.pop(name, None), message.get("reasoning_content")
        if not isinstance(given, str) or not given:  # or what says nothing, as NaN
            continue
        if taken and given != taken:
            raise ValueError(f"message {number} has {name!r} and the same by another name, which differ; leave one of them")
        message["reasoning_content"] = given
    for name in REASONING_LISTS:
        given = message.pop(name, None)
        if _says_something(given) and not message.get("reasoning_content"):
            message["reasoning_content"] = _listed_reasoning(given, f"message {number}: {name}")
    thought = message.get("thought")  # of agents, which is mostly a part of the text
    if message["role"] == "assistant" and _says_something(thought):
        beside = f"{message.get('reasoning_content') or ''}\0{message['content']}"
        if not isinstance(thought, str) or thought.strip() not in beside:
            raise ValueError(
                f"message {number} has 'thought', which is not read; call it 'reasoning_content' if the model gave it as "
                "reasoning, or take the key out"
            )
    if own := _ENCLOSED.fullmatch(message.get("reasoning_content") or ""):  # templates write the tags themselves
        message["reasoning_content"] = (own["thought"] or own["said"]).strip("\n")
    # Templates would write both, as no model does.
    inside = re.match(r"\s*<think>(.*?)</think>", message["content"], re.DOTALL)
    if inside and (beside := message.get("reasoning_content", "").strip()):
        if inside[1].strip() != beside:
            raise ValueError(
                f"message {number} has reasoning_content and a content that begins with other reasoning in <think>; leave "
                "one of them"
            )
        del message["reasoning_content"]


def _listed_reasoning(parts: Any, owner: str) -> str:
    """The text of reasoning that is given as a list of objects: OpenRouter's with `text`, LiteLLM's with `thinking`."""
    texts, indices = [], []
    for part in parts if isinstance(parts, list) else [parts]:
        texts += (
            [part[key] for key in ("text", "thinking") if isinstance(part.get(key), str)] if isinstance(part, dict) else []
        )
        indices.append(part.get("index") if isinstance(part, dict) else None)
    pieces = len(texts) == 1 or (None not in indices and len(set(indices)) == 1)  # of one text, as it was streamed
    if len(texts) != len(indices) or not pieces:
        raise ValueError(f"{owner} is more or other than one text, {_kind(parts)}; give the text as 'reasoning_content'")
    return "".join(texts)


def _refuse_media(fields: dict, owner: str) -> None:
    """ValueError for a key that says there is an image, video or sound, which the text alone would be trained without."""
    for key, value in fields.items():
        words = {word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", str(key))}
        if words & MEDIA and _says_something(value):
            raise ValueError(
                f"{owner} has {key!r} ({_kind(value)}), and only text can be trained on; leave such lines out, or take the "
                "key out where the text stands alone"
            )


def _says_something(value: Any) -> bool:
    """Whether a value is more than the absence of one: null, false, 0, NaN, empty text, or lists and objects of these."""
    if isinstance(value, (dict, list, tuple)):
        return any(_says_something(x) for x in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, float) and math.isnan(value):
        return False
    return bool(value.strip() if isinstance(value, (str, bytes)) else value)


def _beyond_json(value: Any) -> str | None:
    """What of a value JSON cannot write, for an error message: the first of its dates, decimals, bytes or NaN, which come
    out of Parquet files. None where all of it is JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((part for part in map(_beyond_json, value) if part is not None), None)
    if value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value)):
        return None
    return _kind(value)


def _refuse_beyond_json(value: Any, name: str) -> None:
    if (part := _beyond_json(value)) is not None:
        raise ValueError(f"{name} holds what JSON cannot write, {part}; write it as text or as a number")


def _texts(turn: dict) -> list[str]:
    """The texts of a turn whose content is a list of text parts."""
    parts = next((turn[key] for key in ("content", "value") if isinstance(turn.get(key), list)), [])
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return texts if all(isinstance(text, str) for text in texts) else []


def together(texts: list[str], role: str) -> str:
    """A content of several text parts as one string: as vLLM gives it to templates that know only strings. The model wrote
    an answer as one text."""
    return ("" if role == "assistant" else "\n").join(texts)


def _text(content: Any, role: str, number: int, needed: bool) -> str:
    """Content as one string; templates that know only strings then work for OpenAI's lists of text parts too."""
    if isinstance(content, str):
        return content
    if content is None and not needed:
        return ""
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                raise ValueError(f"message {number}: content part {kind!r} is not text; only text can be trained on")
            _refuse_media(part, f"a content part of message {number}")
        return together([part["text"] for part in content], role)
    raise ValueError(f"message {number}: content must be a string or a list of text parts, got {_kind(content)}")


def _tool_call(call: Any, number: int) -> dict:
    """OpenAI sends `arguments` as a JSON string; chat templates (and the engines before they call one) use the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number}: a tool call must be an object with a function name, got {_kind(call)}")
    other = [key for key in ("parameters", "args", "input", "kwargs") if _says_something(function.get(key))]
    if other and not function.get("arguments"):
        raise ValueError(f"message {number}: the call of {function['name']} has {other[0]!r}; call them 'arguments'")
    arguments = _json_if_string(function.get("arguments") or {}, f"message {number}: arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"message {number}: arguments of {function['name']} must be an object, got {_kind(arguments)}")
    if not isinstance(call.get("id"), str | None):
        raise ValueError(f"message {number}: the id of a tool call must be a string, got {_kind(call['id'])}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def with_reasoning(message: dict) -> dict:
    """The message with its reasoning under each of the names that templates know it by (gpt-oss: thinking)."""
    reasoning = message.get("reasoning_content")
    return {"thinking": reasoning, "reasoning": reasoning, **message} if reasoning else message


def with_textual_arguments(message: dict) -> dict:
    """The message with its calls' arguments as JSON text, as OpenAI's API and a few chat templates want them."""

    def textual(call: dict) -> dict:
        function = call.get("function", {})
        if not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [textual(call) for call in calls]} if calls else message


def spellings(messages: Iterable[dict]) -> Iterator[list[dict]]:
    """The messages as chat templates may want them, each to be tried where the one before is refused: reasoning under every
    name. Most templates write a call's arguments from the object, some (DeepSeek) join them on as text."""
    usual = [with_reasoning(message) for message in messages]
    yield usual
    textual = [with_textual_arguments(message) for message in usual]
    if textual != usual:
        yield textual


def _function_call(message: dict, number: int) -> dict:
    """ShareGPT's `function_call` or `tool_call` turn: its text is the JSON of one call or of several."""
    calls = _json_if_string(message.get("content"), f"message {number}: function_call")
    calls = calls if isinstance(calls, list) else [calls]
    return {**message, "content": "", "tool_calls": calls}


def _json_if_string(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_object)
    except KeyTwice as error:
        raise ValueError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} is a string that is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object. KeyTwice where a key has several values, of which json keeps the last without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if json.dumps(value) != json.dumps(made[key]):  # 1, 1.0 and true are equal to Python
                raise KeyTwice(f"an object has the key {key!r} twice, with values that differ; leave one of them")
    return made


def _key(content: Any) -> int:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _kind(value: Any) -> str:
    """A value for an error message: its JSON type, and its beginning if that helps."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "nothing", bool: "a boolean"}
    name = names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
    return name if value is None else f"{name}: {str(value)[:40]}"
