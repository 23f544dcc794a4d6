"""A vLLM server that `fastdraft serve-target` started: what it says of itself, what a run needs of it, and one request."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from fastdraft.target.served.links import Link, NotYet

TESTED = ("0.26", "0.32")  # vLLM's versions whose connector interface and cache layout this was run with, and their patches
IN_FLIGHT = 64  # requests at a time for each server
CONNECT_S = 10.0
NAMES = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class About:
    """What a server says of itself."""

    instance: str
    folder: str
    vllm: str
    weights: str  # `checkpoint_fingerprint` of the files that it was started with
    config: str  # hash of their config.json
    boundaries: tuple[int, ...]  # b: the state that enters layer b, which is the output of layer b - 1; ascending
    hidden_size: int
    dtype: str  # bfloat16 or float32, PyTorch's name
    max_model_len: int
    states_port: int | None  # where it hands states over to other hosts; None: nowhere
    token: str | None  # that it takes there


@dataclass(frozen=True)
class Wanted:
    """What a run needs its servers to be."""

    weights: str
    config: str
    layers: tuple[int, ...]  # outputs from 0
    num_layers: int  # of the target
    hidden_size: int
    dtype: str  # bf16 or fp32
    max_length: int  # tokens of the longest document

    @property
    def boundaries(self) -> list[int]:
        """Those of `About.boundaries` that it reads."""
        return sorted({layer + 1 for layer in self.layers} | {self.num_layers})


@dataclass
class FeatureServer:
    """A server as this process deals with it."""

    url: str  # without /v1
    client: httpx.AsyncClient
    model: str = ""
    about: About | None = None  # None: it was restarted, and is compared again before its states are used
    link: Link | None = None  # how its states come here
    busy: int = 0  # requests of this process
    failures: int = 0  # since the last answer
    failing_since: float | None = None  # time.monotonic() of the first of them
    told: bool = False  # whether the user knows of them
    resting_until: float = 0.0  # time.monotonic()
    comparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))


async def open_server(url: str, api_key: str | None, timeout_s: float) -> FeatureServer:
    """Asks a server what it is. ValueError when it cannot be reached or was not started by `serve-target`."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"target.url {url!r} is no server's address; write http://host:port")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds what no header may, such as the end of a line; set it again")
    client = httpx.AsyncClient(
        base_url=base,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=IN_FLIGHT),
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
        trust_env=False,  # no proxy stands between a trainer and the server beside it
    )
    server = FeatureServer(base, client)
    try:
        server.model = (await answer_of(server, "/v1/models"))["data"][0]["id"]
        server.about = await describe(server)
    except NotYet as error:
        raise ValueError(f"{error}; start it with `fastdraft serve-target`, and wait until it is ready") from error
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{base} does not answer as vLLM does ({error!r}); is it the right address?") from error
    return server


async def describe(server: FeatureServer) -> About:
    """What a server says of itself now. NotYet when it does not answer, ValueError when it is none of `serve-target`."""
    answer = await complete(server, [0], {"kv_transfer_params": {"describe": True}})
    told = answer.get("kv_transfer_params")
    try:
        return About(
            **{name: told[name] for name in About.__dataclass_fields__} | {"boundaries": tuple(told["boundaries"])}
        )
    except (KeyError, TypeError):
        raise ValueError(
            f"{server.url} hands over no states: it was not started by this version of `fastdraft serve-target`"
        ) from None


def served_dtype(url: str, timeout_s: float) -> str:
    """bf16 or fp32, as a server runs its target. ValueError as for `open_server`, or for another dtype."""

    async def ask() -> About:
        server = await open_server(url, os.environ.get("OPENAI_API_KEY"), timeout_s)
        await server.client.aclose()
        return server.about

    return _named(asyncio.run(ask()).dtype, url)


def is_tested(version: str) -> bool:
    return any(version == minor or version.startswith(f"{minor}.") for minor in TESTED)


def tested() -> str:
    return " and ".join(f"{minor}.*" for minor in TESTED)


def refuse_other_server(url: str, about: About, wanted: Wanted) -> None:
    """ValueError with one sentence on the first thing in which a server is not what the run needs."""
    if not is_tested(about.vllm):
        raise ValueError(
            f"{url} runs vLLM {about.vllm}; states are read only from the versions that this was tested with, {tested()}"
        )
    for name, ours, theirs in (("config.json", wanted.config, about.config), ("weights", wanted.weights, about.weights)):
        if ours != theirs:
            raise ValueError(
                f"{url} serves another model or revision than target.path: its {name} has the fingerprint {theirs}, "
                f"target.path's {ours}; serve the target of this run, or set target.path to the one that is served"
            )
    if (dtype := _named(about.dtype, url)) != wanted.dtype:
        raise ValueError(
            f"{url} runs the target in {dtype}, and target.dtype is {wanted.dtype}; start it with --dtype "
            f"{next(k for k, v in NAMES.items() if v == wanted.dtype)}, or set target.dtype={dtype} for a new run"
        )
    if about.hidden_size != wanted.hidden_size or not set(wanted.boundaries) <= set(about.boundaries):
        layers = ",".join(map(str, wanted.layers))
        raise ValueError(
            f"{url} hands over the states at the boundaries {list(about.boundaries)}, {about.hidden_size} wide, and this "
            f"run reads those at {wanted.boundaries}, {wanted.hidden_size} wide; start it with --layers {layers}"
        )
    if about.max_model_len <= wanted.max_length:
        raise ValueError(
            f"{url} takes {about.max_model_len} tokens with the one it generates, and documents have up to "
            f"{wanted.max_length}; start it with --max-model-len {wanted.max_length + 1}, or set "
            f"data.max_length={about.max_model_len - 1} or less"
        )


def _named(dtype: str, url: str) -> str:
    if dtype not in NAMES:
        raise ValueError(f"{url} runs the target in {dtype}; start it with --dtype bfloat16 or float32")
    return NAMES[dtype]


async def complete(server: FeatureServer, ids: list[int], more: dict[str, Any]) -> dict[str, Any]:
    """One request for one token after `ids`. NotYet where it may go better later, ValueError where it will not."""
    body = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "detokenize": False, **more}
    return await answer_of(server, "/v1/completions", body)


async def answer_of(server: FeatureServer, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a server answers: a GET without a body, else a POST. Raises as `complete`."""
    try:
        sent = server.client.get(path) if body is None else server.client.post(path, json=body)
        response = await sent
    except httpx.TimeoutException as error:
        raise NotYet(f"{server.url} did not answer in time ({type(error).__name__})") from error
    except httpx.HTTPError as error:
        raise NotYet(f"{server.url} cannot be reached ({type(error).__name__}: {error})") from error
    if response.status_code == 200:
        with suppress(ValueError):
            if isinstance(answer := response.json(), dict):
                return answer
        raise NotYet(f"{response.url} does not answer with JSON, but {response.text[:100]!r}")
    said = " ".join(response.text.split())[:300]
    with suppress(ValueError, KeyError, TypeError):
        said = " ".join(str(response.json()["error"]["message"]).split())[:300]
    sentence = f"{response.url}: HTTP {response.status_code}: {said}"
    if response.status_code in (401, 403):
        raise ValueError(f"{sentence}; set the environment variable OPENAI_API_KEY to the server's key")
    if response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
        raise NotYet(sentence)
    raise ValueError(sentence)
