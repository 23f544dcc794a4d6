"""`fastdraft serve-target`: the command it starts, and the connector that vLLM loads. A stand-in for vLLM's few names lets
the connector be tested here; tests/engines has it in the real one."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import time
import types
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import refusal

from fastdraft.serving import engines
from fastdraft.target.served.connector import fastdraft_handover as handover
from fastdraft.target.served.server import serve_command

# --- the command ----------------------------------------------------------------------------------------------------------


def option(arguments: list[str], name: str) -> dict:
    return json.loads(arguments[arguments.index(name) + 1])


def test_the_command_is_vllms_own_with_two_options(target_dir, tmp_path):
    flags = ["--port", "8123", "--tensor-parallel-size=2"]
    command = serve_command("python", str(target_dir), flags, folder=str(tmp_path / "shared"))
    assert command.arguments[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command.arguments[-3:] == flags and command.url == "http://localhost:8123"
    states = option(command.arguments, "--speculative-config")
    assert states["method"] == "extract_hidden_states"
    assert states["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5, 8]
    connector = option(command.arguments, "--kv-transfer-config")
    assert connector["kv_connector_module_path"] == "fastdraft_states"
    place = Path(command.environment["PYTHONPATH"])
    assert (place / "fastdraft_states.py").exists() and not (place / "cli.py").exists()
    assert not (tmp_path / "shared").exists()  # the command is only made


def test_layers_and_folder_are_chosen(target_dir):
    command = serve_command("python", str(target_dir), [], layers=(0, 7))
    ids = option(command.arguments, "--speculative-config")["draft_model_config"]["hf_config"]
    assert ids["eagle_aux_hidden_state_layer_ids"] == [1, 8]
    assert command.folder == f"/dev/shm/fastdraft-{os.getuid()}-8000"
    for layers in ((7, 0), (1, 1), (0, 8), (-1, 3), ()):
        with pytest.raises(ValueError, match=r"must ascend and lie in 0..7"):
            serve_command("python", str(target_dir), [], layers=layers)


def test_a_hub_name_is_served_from_the_files_that_a_trainer_reads(target_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastdraft.target.served.server.snapshot_download", lambda name, **_: asked.append(name) or str(target_dir)
    )
    command = serve_command("python", "some/model", [])
    assert asked == ["some/model"] and command.arguments[command.arguments.index("--model") + 1] == str(target_dir)


@pytest.mark.parametrize(
    "flag",
    [
        "--speculative-config={}",
        "--kv_transfer_config",
        "--skip-tokenizer-init",
        "--hf-overrides",
        "--model",
        "--model-impl",
        "--hf-overrides.rope_parameters.rope_theta",
        "--hf_overrides.vocab_size=9",
        "--hf-overr",
        "--speculative-config.method",
        "-sc.method",
        "-s",
        "--spec-model",
        "--config",
        "--config=vllm.yaml",
    ],
)
def test_a_flag_that_is_the_commands_own_is_refused_with_the_reason(target_dir, flag):
    with pytest.raises(ValueError, match=r"serve-target does not take vLLM's --?\w"):
        serve_command("python", str(target_dir), [flag, "x"])


def test_flags_that_begin_as_one_of_the_commands_own_are_vllms(target_dir):
    flags = ["--config-format", "hf", "--hf-token", "x", "--gpu-memory-utilization=0.5", "--compilation-config.level", "0"]
    flags += ["--served-model-name", "model", "-tp", "1"]
    assert serve_command("python", str(target_dir), flags).arguments[-len(flags) :] == flags


def test_on_the_command_line(target_dir, fastdraft, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "engine_version", lambda place: "0.32.1")
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *call: started.append(call))
    shared = tmp_path / "shared"
    call = [
        "serve-target",
        target_dir,
        "--engine-python",
        "python3",
        "--folder",
        shared,
        "--port",
        "8777",
        "--layers",
        "1,6",
    ]
    code, out, _ = fastdraft(*call, "--print")
    assert code == 0 and not started and not shared.exists()
    assert "vllm.entrypoints.openai.api_server" in shlex.split(out) and "--port" in shlex.split(out)
    code, out, _ = fastdraft(*call)
    assert code == 0 and shared.stat().st_mode & 0o777 == 0o700
    assert "target.url: http://localhost:8777" in out and "layers [1, 6]" in out
    program, arguments, environment = started[0]
    assert program == "python3" and "--port" in arguments and environment["PATH"] == os.environ["PATH"]
    assert "--layers x is no list" in refusal(fastdraft("serve-target", target_dir, "--layers", "x"))
    monkeypatch.setattr(engines, "engine_version", lambda place: "0.33.0")
    assert "0.32.*" in refusal(fastdraft(*call))


# --- the connector --------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(monkeypatch):
    """The connector's module, as vLLM imports it."""

    class Base:
        def __init__(self, vllm_config, role, kv_cache_config=None):
            self._vllm_config, self._kv_transfer_config = vllm_config, vllm_config.kv_transfer_config

        def has_connector_metadata(self):
            return True

        def _get_connector_metadata(self):
            return self.metadata

    class HiddenStateCacheSpec(SimpleNamespace):
        pass

    class RequestStatus(Enum):
        FINISHED_STOPPED, FINISHED_LENGTH_CAPPED, FINISHED_ABORTED = range(3)

    names = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.config": {"get_layers_from_vllm_config": lambda config, kind, names: dict.fromkeys(names)},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": object,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.model_executor.models.extract_hidden_states": {"CacheOnlyAttentionLayer": object},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.v1.kv_cache_interface": {"HiddenStateCacheSpec": HiddenStateCacheSpec},
        "vllm.v1.request": {"RequestStatus": RequestStatus},
    }
    for name, members in names.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            if ".".join(parts[:i]) not in names:
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(Path(handover.__file__).parent))
    for name in ("fastdraft_states", "fastdraft_handover"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("fastdraft_states")
    yield module
    for name in ("fastdraft_states", "fastdraft_handover"):
        sys.modules.pop(name, None)


@pytest.fixture
def connector(states, tmp_path):
    """One connector for the scheduler and the worker: 2 states of 3 numbers, blocks of 4 tokens, in the second group."""
    extra = {"folder": str(tmp_path / "shared"), "instance": "one", "identity": {"weights": "w", "config": "c"}}
    draft = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=[5, 2]))
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        model_config=SimpleNamespace(
            get_hidden_size=lambda: 3,
            dtype=torch.float32,
            max_model_len=64,
            hf_text_config=SimpleNamespace(),
        ),
        speculative_config=SimpleNamespace(draft_model_config=draft),
    )
    groups = [
        SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=8)),
        SimpleNamespace(kv_cache_spec=states.HiddenStateCacheSpec(block_size=4)),
    ]
    made = states.FastdraftStates(config, None, SimpleNamespace(kv_cache_groups=groups))
    made.register_kv_caches({"layer": torch.arange(10 * 2 * 4 * 3, dtype=torch.float32).view(10, 2, 4, 3)})
    return made


@pytest.mark.parametrize(
    ("latent", "on_cpu", "rope", "is_right"),
    [
        (True, True, {"rope_type": "default"}, False),
        (True, True, None, False),
        (True, True, {"rope_type": "yarn"}, True),
        (True, False, {"rope_type": "default"}, True),
        (False, True, {"rope_type": "default"}, True),
    ],
)
def test_a_rope_that_vllms_build_for_cpus_computes_wrongly(states, monkeypatch, latent, on_cpu, rope, is_right):
    monkeypatch.setattr(states, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    text = SimpleNamespace(rope_parameters=rope, kv_lora_rank=512 if latent else None)
    model = SimpleNamespace(hf_text_config=text)
    if is_right:
        states._refuse_wrong_rope(model)
    else:
        with pytest.raises(ValueError, match=r"rotates the queries wrongly"):
            states._refuse_wrong_rope(model)


def new(req_id, name, tokens, blocks, computed=0):
    params = SimpleNamespace(extra_args={"kv_transfer_params": {"states": name}} if name else None)
    return SimpleNamespace(
        req_id=req_id,
        sampling_params=params,
        prompt_token_ids=[1] * tokens,
        block_ids=([99], blocks),
        num_computed_tokens=computed,
    )


def step(fresh=(), old=(), resumed=(), **scheduled):
    """`old`: (request, its new blocks or None, tokens computed before)."""
    ids, blocks, computed = ([list(x) for x in zip(*old, strict=True)]) if old else ([], [], [])
    cached = SimpleNamespace(
        req_ids=ids,
        new_block_ids=[None if b is None else ([99], b) for b in blocks],
        num_computed_tokens=computed,
        resumed_req_ids=set(resumed),
    )
    return SimpleNamespace(scheduled_new_reqs=list(fresh), scheduled_cached_reqs=cached, num_scheduled_tokens=scheduled)


def done(connector, scheduled) -> dict[str, list[int]]:
    return {prompt.name: prompt.blocks for prompt in connector.build_connector_meta(scheduled).prompts}


A, B = "a" * 16 + "-1", "b" * 16 + "-2"


def test_a_prompt_is_handed_over_in_the_step_of_its_last_token(connector):
    assert done(connector, step([new("r", A, 6, [3, 1])], r=6)) == {A: [3, 1]}
    # Chunks, of which the last brings a block, beside a request that asks for nothing.
    assert done(connector, step([new("s", A, 11, [3, 1]), new("t", None, 4, [2])], s=8, t=4)) == {}
    assert done(connector, step(old=[("s", [7], 8), ("t", None, 4)], s=3, t=1)) == {A: [3, 1, 7]}
    assert done(connector, step(old=[("s", None, 11)], s=1)) == {}  # once
    # The prefix cache had all but the last token.
    assert done(connector, step([new("u", B, 9, [3, 1, 8], computed=8)], u=1)) == {B: [3, 1, 8]}


def test_a_preempted_prompt_is_read_from_its_new_blocks(connector):
    assert done(connector, step([new("r", A, 11, [3, 1])], r=8)) == {}
    assert done(connector, step(old=[("r", [5, 6], 0)], resumed=["r"], r=8)) == {}
    assert done(connector, step(old=[("r", [2], 8)], r=3)) == {A: [5, 6, 2]}


def test_a_name_that_is_no_clients_is_not_written(connector):
    for name in ("../../etc/x", "states", A + "/..", {"a": 1}):
        assert done(connector, step([new("r", name, 4, [1])], r=4)) == {}


def test_a_request_that_ends_early_is_forgotten(connector):
    request = SimpleNamespace(request_id="r", kv_transfer_params={"states": A})
    connector.build_connector_meta(step([new("r", A, 11, [3, 1])], r=8))
    assert connector.request_finished(request, []) == (False, {"instance": "one"})
    assert not connector.running
    request.kv_transfer_params = None
    assert connector.request_finished(request, []) == (False, None)
    request.kv_transfer_params = {"describe": True}
    _, about = connector.request_finished_all_groups(request, ([], []))
    assert about["boundaries"] == [2, 5] and about["weights"] == "w" and about["dtype"] == "float32"


def ended(states, status: str, name=A, **more):
    status = states.RequestStatus[f"FINISHED_{status}"]
    asked = {"states": name, "answer": True} | more
    return SimpleNamespace(request_id="r", kv_transfer_params=asked, status=status, num_tokens=11)


def test_an_answer_is_handed_over_when_it_has_ended(connector, states, tmp_path):
    client, lock = handover.new_client(str(tmp_path / "shared"))
    name = f"{client}-1"
    fresh = new("r", name, 6, [3, 1])
    fresh.sampling_params.extra_args["kv_transfer_params"]["answer"] = True
    assert done(connector, step([fresh], r=6)) == {}  # not the prompt alone
    assert done(connector, step(old=[("r", [7], 6)], r=2)) == {}
    for status in ("STOPPED", "LENGTH_CAPPED"):
        finished = connector.request_finished_all_groups(ended(states, status, name), ([99], [3, 1, 7]))
        assert finished == (True, {"instance": "one"})  # its blocks are held
        connector.metadata = connector.build_connector_meta(step())
        assert connector.metadata.answers == {"r": states.Extracted(name, 10, [3, 1, 7])}  # all tokens but the last
        connector.start_load_kv(None)
        assert connector.get_finished({"r"}) == ({"r"}, None)  # and are free behind this step
        rows = torch.frombuffer(bytearray(wait_for(tmp_path / "shared" / name).read_bytes()), dtype=torch.float32)
        cached = torch.cat([connector.cache[block] for block in (3, 1, 7)], 1)
        assert torch.equal(rows.view(10, 2, 3), cached.transpose(0, 1)[:10])
        os.unlink(tmp_path / "shared" / name)
        connector.metadata = connector.build_connector_meta(step())
        assert connector.get_finished(set()) == (None, None)  # once
    os.close(lock)


def test_an_answer_that_was_given_up_holds_nothing(connector, states):
    for request in (ended(states, "ABORTED"), ended(states, "STOPPED", "../../x"), ended(states, "STOPPED", answer=False)):
        assert connector.request_finished_all_groups(request, ([99], [3, 1, 7])) == (False, {"instance": "one"})
    assert not connector.build_connector_meta(step()).answers


def test_rows_come_out_in_the_order_of_the_prompt(connector, states, tmp_path):
    folder = str(tmp_path / "shared")
    assert handover.read_server(folder) == {"instance": "one"}
    client, lock = handover.new_client(folder)
    connector.metadata = states.Complete([states.Extracted(f"{client}-1", 6, [3, 1])])
    connector.wait_for_save()
    file = wait_for(tmp_path / "shared" / f"{client}-1")
    rows = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view(6, 2, 3)
    for token in range(6):
        block, slot = [3, 1][token // 4], token % 4
        assert torch.equal(rows[token], connector.cache[block, :, slot])
    os.close(lock)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0"])
def test_both_layouts_of_the_cache_give_the_same_rows(connector, states, version, monkeypatch):
    monkeypatch.setattr(states.vllm, "__version__", version)
    assert connector.get_required_kvcache_layout(None) == {"0.26.0": "NHD", "0.32.0": "LBNHC"}[version]
    by_state = torch.randn(10, 2, 4, 3)
    for cache in (by_state, by_state.transpose(1, 2).contiguous()):
        rows = states._rows(connector._by_state(cache), torch.tensor([3, 1]), 6)
        assert torch.equal(rows, torch.cat([by_state[3], by_state[1]], dim=1).transpose(0, 1)[:6])
    with pytest.raises(ValueError, match=r"\(10, 4, 4, 3\), which does not tell 2 states from 4 tokens"):
        connector._by_state(torch.zeros(10, 4, 4, 3))


def test_a_full_memory_is_told_and_the_engine_goes_on(connector, states, tmp_path, monkeypatch):
    client, lock = handover.new_client(str(tmp_path / "shared"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "hand_over", full)
    connector.metadata = states.Complete([states.Extracted(f"{client}-1", 6, [3, 1])])
    connector.wait_for_save()
    assert "No space left" in wait_for(tmp_path / "shared" / f"{client}-1.error").read_text()
    monkeypatch.undo()
    connector.metadata = states.Complete([states.Extracted(f"{client}-2", 6, [3, 1])])
    connector.wait_for_save()
    wait_for(tmp_path / "shared" / f"{client}-2")
    os.close(lock)


def wait_for(file: Path) -> Path:
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.01)
    return file
