"""`fastdraft data regenerate`: whatever servers do and whenever it is killed, every prompt has its answer once."""

from __future__ import annotations

import datetime
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import chats
import httpx
import pyarrow
import pyarrow.parquet
import pytest
from answering import FakeServer, answer_to
from rich.console import Console
from tiny import WORDS, make_tokenizer, tiny_llama

from fastdraft.answers import local as answer_local
from fastdraft.answers.file import AnswerFile
from fastdraft.answers.job import Sampling
from fastdraft.answers.local import LocalTarget
from fastdraft.answers.regenerate import regenerate
from fastdraft.answers.server import Servers, parse_extra_body
from fastdraft.answers.servers import check_status
from fastdraft.data.config import DataConfig
from fastdraft.data.prepare import prepare
from fastdraft.data.prompts import Prompt, prompt_ids
from fastdraft.decode import generate
from fastdraft.target.hf import Target

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def serve():
    """serve(...) -> a FakeServer, closed after the test."""
    servers = []

    def start(**options) -> FakeServer:
        servers.append(FakeServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 20)


def write_prompts(path: Path, count: int) -> Path:
    """One to three questions each, the earlier ones with an old answer."""
    rows = []
    for i in range(count):
        texts = [f"{WORDS[i % 50]} {WORDS[(7 * i + k) % 90]}" for k in range(2 * (i % 3) + 1)]
        rows.append({"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(prompts, tmp_path):
    """run(servers or a local target) -> outcome, what was printed."""

    def call(by, sampling=GREEDY, out=tmp_path / "out.jsonl", paths=None, servers=None, **options):
        if not isinstance(by, LocalTarget):
            urls = [by.url] if isinstance(by, FakeServer) else [s.url for s in by]
            by = Servers(urls, None, sampling, **{"backoff_s": 0.01, "timeout_s": 5.0, **(servers or {})})
        printed = io.StringIO()
        outcome = regenerate(paths or [str(prompts)], out, by, Console(file=printed, width=500), **options)
        return outcome, printed.getvalue()

    return call


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def undisturbed(run, serve, tmp_path) -> bytes:
    """The output of a run that nothing went wrong in."""
    outcome, _ = run(serve(), out=tmp_path / "undisturbed" / "out.jsonl")
    assert outcome.complete
    return (tmp_path / "undisturbed" / "out.jsonl").read_bytes()


# --- servers -------------------------------------------------------------------------------------------------------------


def test_answers_in_the_order_of_the_input(undisturbed, prompts, tmp_path):
    rows = rows_of(tmp_path / "undisturbed" / "out.jsonl")
    assert [row["id"].split("-")[1] for row in rows] == [str(i) for i in range(20)]
    for row, given in zip(rows, rows_of(prompts), strict=True):
        assert [m["content"] for m in row["messages"][0::2]] == [m["content"] for m in given["messages"][0::2]]
        for k in range(1, len(row["messages"]), 2):  # each answer is that to everything before it, new answers included
            assert row["messages"][k]["content"] == answer_to({"messages": row["messages"][:k]})["message"]["content"]
    left = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert left == {"out.jsonl", "out.jsonl.meta.json", "out.jsonl.lock"}


def test_dates_beside_the_messages_of_a_parquet_file_are_left_out(run, serve, tmp_path):
    turns = [{"role": "user", "content": f"{WORDS[0]} {WORDS[1]}", "timestamp": datetime.datetime(2024, 5, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "p.parquet")
    outcome, _ = run(serve(), paths=[str(tmp_path / "p.parquet")])
    assert outcome.complete
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert [sorted(message) for message in row["messages"]] == [["content", "role"]] * 2


def test_faults_change_nothing(undisturbed, run, serve, tmp_path):
    faults = {
        0: (429, {"Retry-After": "0"}, b'{"error": {"message": "full"}}'),
        1: (500, {}, b"oops"),
        2: (200, {}, b"<html>"),
        3: (200, {}, b'{"choices": []}'),
        4: "disconnect",
        5: (503, {}, b""),
        6: 0.6,
        7: (200, {}, json.dumps({"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}).encode()),
        9: (200, {"Content-Encoding": "gzip"}, b"no gzip"),
    }
    servers = [serve(fault=lambda number, body: faults.get(number)) for _ in range(2)]
    outcome, _ = run(servers, servers={"concurrency": 3, "timeout_s": 0.3})
    assert outcome.complete and outcome.failures == 0
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert all(len(server.requests) > 10 for server in servers)


def test_a_server_that_dies_is_replaced_by_the_other(undisturbed, run, serve, tmp_path):
    dying, other = serve(), serve(delay_s=0.01)

    def die(number, body):
        if number >= 4:
            dying.http.socket.close()
            return "disconnect"

    dying.fault = die
    outcome, _ = run([dying, other], servers={"concurrency": 2})
    assert outcome.complete and (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_concurrency_is_bounded_and_used(run, serve):
    servers = [serve(delay_s=0.03) for _ in range(2)]
    run(servers, servers={"concurrency": 3})
    assert [server.most_busy for server in servers] == [3, 3]


def test_a_conversation_stays_with_its_server(run, serve):
    servers = [serve(delay_s=0.01) for _ in range(2)]
    run(servers, servers={"concurrency": 2})
    first, second = ({str(body["messages"][0]) for body in server.requests} for server in servers)
    assert first and second and not first & second


def test_retry_after_is_honoured(run, serve):
    times = []

    def fault(number, body):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"") if number == 0 else None

    run(serve(fault=fault), servers={"concurrency": 1})
    assert times[1] - times[0] >= 0.4


def test_settings_reach_the_server_and_the_record(run, serve, tmp_path):
    server = serve()
    sampling = Sampling(0.6, 0.9, 40, 77, 5, parse_extra_body('{"chat_template_kwargs": {"enable_thinking": true}}'))
    run(server, sampling, servers={"api_key": "secret"})
    sent = {"model": "tiny", "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_tokens": 77}
    sent |= {"chat_template_kwargs": {"enable_thinking": True}}
    assert all(sent.items() <= body.items() for body in server.requests)
    assert len({body["seed"] for body in server.requests}) == len(server.requests)
    assert server.keys == {"Bearer secret"}
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    kept = {"model": "tiny", "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_new_tokens": 77, "seed": 5}
    assert kept.items() <= meta["settings"].items() and server.url in meta["by"]
    assert meta["result"]["conversations"] == 20 and meta["fastdraft"]
    assert "secret" not in (tmp_path / "out.jsonl.meta.json").read_text()


def test_unset_settings_are_left_to_the_server(run, serve):
    server = serve()
    run(server, Sampling())
    assert all(body.keys() == {"model", "messages", "max_tokens"} for body in server.requests)


def test_tools_reasoning_and_cut_answers(run, serve, tmp_path):
    def choice(body):
        if body["messages"][-1]["role"] == "tool":
            return {"message": {"content": "wet", "reasoning_content": "rain is wet"}, "finish_reason": "length"}
        calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
        return {"message": {"content": None, "tool_calls": calls, "reasoning": "look"}, "finish_reason": "tool_calls"}

    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    old = [{"id": "old", "type": "function", "function": {"name": "weather", "arguments": {"city": "Roma"}}}]
    given = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": old},
        {"role": "tool", "content": "rain", "tool_call_id": "old"},
    ]
    source = tmp_path / "tools.jsonl"
    source.write_text(json.dumps({"messages": given, "tools": [tool]}))
    server = serve(choice=choice)
    outcome, printed = run(server, paths=[str(source)])
    assert outcome.complete and "1 with an answer cut" in printed
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert server.requests[0]["tools"] == row["tools"] == [tool]
    assert row["messages"][1]["tool_calls"] == choice({"messages": given[:1]})["message"]["tool_calls"]
    assert row["messages"][1]["reasoning"] == "look" and row["messages"][2]["tool_call_id"] == "c1"
    assert row["messages"][3] == {"role": "assistant", "content": "wet", "reasoning_content": "rain is wet"}
    assert row["finish_reasons"] == ["tool_calls", "length"] and row["length_cut"] is True


def test_the_output_is_training_data(undisturbed, tmp_path):
    config = DataConfig(
        paths=[str(tmp_path / "undisturbed" / "out.jsonl")],
        eval_fraction=0,
        cache_dir=str(tmp_path / "cache"),
        num_workers=0,
    )
    prepared = prepare(config, make_tokenizer())
    assert prepared.stats.conversations == prepared.stats.train_samples == 20


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


@pytest.mark.parametrize("strips", [False, True])
def test_what_a_model_generated_is_what_is_trained_behind_what_it_was_asked(run, serve, tmp_path, strips):
    """The server is a model whose text a parser cuts in two, as vLLM's does (white space stays), and SGLang's."""
    tokenizer, generated = chats.make_tokenizer(THINKING), {}

    def choice(body):
        prompt = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        text = f"since {len(body['messages'])}\n</think>\n\nsaid {len(prompt)}"
        generated[prompt] = f"{text}<|im_end|>"
        thought, _, said = text.partition("</think>")
        thought, said = (thought.strip(), said.strip()) if strips else (thought, said)
        message = {"role": "assistant", "content": said, "reasoning": thought, "reasoning_content": thought}
        return {"message": message, "finish_reason": "stop"}

    run(serve(choice=choice))
    config = DataConfig(
        paths=[str(tmp_path / "out.jsonl")], eval_fraction=0, cache_dir=str(tmp_path / "cache"), num_workers=0
    )
    trained = {}
    for row in prepare(config, tokenizer).train:
        ids, mask = row["input_ids"], row["loss_mask"]
        begins = [i for i, here in enumerate(mask) if here and not mask[i - 1]]
        for begin in begins:
            end = next((i for i in range(begin, len(mask)) if not mask[i]), len(mask))
            trained[tokenizer.decode(ids[:begin])] = tokenizer.decode(ids[begin:end])
    assert trained == generated and len(generated) > 20


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def test_failures_are_listed_and_only_they_are_tried_again(undisturbed, run, serve, tmp_path):
    def refuse(number, body):
        long = len(body["messages"]) == 5
        return (400, {}, b'{"error": {"message": "too long for me"}}') if long else None

    outcome, printed = run(serve(fault=refuse))
    assert not outcome.complete and outcome.failures == 6 and "6 conversations failed" in printed
    assert not (tmp_path / "out.jsonl").exists()
    failures = rows_of(tmp_path / "out.failures.jsonl")
    assert {f["answer"] for f in failures} == {3} and all("too long for me" in f["reason"] for f in failures)
    assert [f["where"].split(":")[1] for f in failures] == [str(i + 1) for i in range(20) if i % 3 == 2]

    outcome, printed = run(serve(fault=refuse), allow_failures=True)
    assert outcome.complete and outcome.failures == 6
    assert len(rows_of(tmp_path / "out.jsonl")) == 14 and len(rows_of(tmp_path / "out.failures.jsonl")) == 6

    server = serve()
    outcome, _ = run(server)
    assert outcome.complete and (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert len(server.requests) == 6 * 3 and not (tmp_path / "out.failures.jsonl").exists()

    server = serve()
    assert run(server)[0].complete and not server.requests
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_a_conversation_no_server_can_answer_is_a_failure(run, serve, tmp_path):
    outcome, _ = run(serve(fault=lambda number, body: (500, {}, b"crash")), servers={"retries": 1}, allow_failures=True)
    assert outcome.failures == 20
    assert "HTTP 500: crash (2 attempts)" in rows_of(tmp_path / "out.failures.jsonl")[0]["reason"]


def test_servers_that_are_gone_end_the_run(undisturbed, run, serve, tmp_path):
    server = serve()
    server.fault = lambda number, body: (503, {}, b"down") if number >= 10 else None
    with pytest.raises(ValueError, match=r"no server has answered.*HTTP 503: down.*same command"):
        run(server, servers={"retries": 2, "concurrency": 2})
    assert 0 < len((tmp_path / "out.jsonl.part").read_text().splitlines()) <= 10
    assert run(serve())[0].complete and (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_refusing_everything_ends_the_run(run, serve, tmp_path):
    prompts = write_prompts(tmp_path / "many.jsonl", 80)
    with pytest.raises(ValueError, match=r"50 conversations in a row failed, the last.*no such setting"):
        run(serve(fault=lambda number, body: (400, {}, b"no such setting")), paths=[str(prompts)])
    assert len(rows_of(tmp_path / "out.failures.jsonl")) >= 50


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((401, {}, b""), "refuses the API key"),
        ((404, {}, b""), "does the address end in /v1"),
        ((500, {}, b"boom"), "HTTP 500: boom"),
        ((200, {}, b"<html>"), "not an OpenAI-compatible server"),
        ((200, {}, b'{"data": [{"id": "a"}, {"id": "b"}]}'), "serves a, b: say which with --model"),
    ],
)
def test_a_wrong_server_is_named(run, serve, models, said):
    server = serve()
    server.models = models
    with pytest.raises(ValueError, match=said):
        run(server)


def test_a_server_of_another_model_is_named(run, serve):
    server = serve()
    with pytest.raises(ValueError, match="does not serve large; it serves tiny"):
        Servers([server.url], "large", GREEDY)


@pytest.mark.parametrize("status", [401, 404])
def test_what_is_wrong_for_all_ends_the_run_at_once(run, serve, status):
    server = serve(fault=lambda number, body: (status, {}, b"gone wrong"))
    with pytest.raises(ValueError, match=f"HTTP {status}: gone wrong"):
        run(server, servers={"concurrency": 1})
    assert len(server.requests) == 1


def test_bad_lines_are_named_or_skipped(run, serve, tmp_path):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"prompt": "a"}\n{"input_ids": [1], "loss_mask": [1]}\n{"messages": []}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: has token ids"):
        run(serve(), paths=[str(source)])
    outcome, printed = run(serve(), paths=[str(source)], skip_bad_lines=True)
    assert outcome.complete and "2 lines cannot be used" in printed
    assert [row["id"].split("-")[1] for row in rows_of(tmp_path / "out.jsonl")] == ["0", "3"]


def test_other_settings_are_refused_by_name(run, serve, prompts, tmp_path):
    run(serve())
    with pytest.raises(ValueError, match=r"max_new_tokens 8 then, 9 now.*--fresh"):
        run(serve(), Sampling(0.0, max_new_tokens=9))
    prompts.write_text(prompts.read_text() + '{"prompt": "more"}\n')
    with pytest.raises(ValueError, match="source"):
        run(serve())
    assert run(serve(), fresh=True)[0].complete and len(rows_of(tmp_path / "out.jsonl")) == 21


def test_a_full_disk_is_a_sentence_and_what_was_written_is_kept(tmp_path):
    rows = [{"id": f"x-{i}", "completion_tokens": 1, "length_cut": False} for i in range(2)]
    with (
        pytest.raises(ValueError, match=r"out.jsonl.part cannot be written: No space left on device; the 1 conversations"),
        ExitStack() as stack,
        AnswerFile(tmp_path / "out.jsonl", {}, {}) as file,
    ):
        file.append(rows[0])
        file._file = stack.enter_context(open("/dev/full", "ab"))
        file.append(rows[1])
    with AnswerFile(tmp_path / "out.jsonl", {}, {}) as file:
        assert list(file.rows) == [0]


def test_a_file_of_somebody_else_is_left_alone(run, serve, prompts, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="exists, but not"):
            run(serve(), fresh=fresh)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    before = prompts.read_bytes()
    with pytest.raises(ValueError, match="one of the files of prompts"):
        run(serve(), out=prompts, fresh=True)
    assert prompts.read_bytes() == before


def test_more_requests_than_open_files_are_refused(serve):
    with pytest.raises(ValueError, match="ulimit -n"):
        Servers([serve().url], None, GREEDY, concurrency=10**9)


@pytest.mark.parametrize("extra", ["[1]", "{", '{"temperature": 1}', '{"messages": []}'])
def test_a_wrong_extra_body_is_refused(extra):
    with pytest.raises(ValueError, match="--extra-body"):
        parse_extra_body(extra)


# --- interruptions -------------------------------------------------------------------------------------------------------


def command(prompts: Path, out: Path, server: FakeServer) -> list[str]:
    options = ["--temperature", "0", "--max-new-tokens", "8", "--concurrency", "2"]
    return [
        sys.executable,
        "-m",
        "fastdraft.cli",
        "data",
        "regenerate",
        str(prompts),
        "--out",
        str(out),
        "--url",
        server.url,
        *options,
    ]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_rows(part: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not part.exists() or part.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_and_begun_again_is_byte_for_byte_the_same(undisturbed, run, serve, prompts, tmp_path):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    first = serve(delay_s=0.05)
    process = start(prompts, out, first)
    wait_for_rows(part, 4)
    process.kill()
    process.wait()
    kept = part.read_bytes()
    with part.open("ab") as file:  # a line torn by the kill
        file.write(b'{"id": "77-5", "mess')
    second = serve()
    outcome, printed = run(second, servers={"concurrency": 2})
    done = kept.count(b"\n")
    assert outcome.complete and f"{done} of 20 conversations are answered already" in printed
    assert out.read_bytes() == undisturbed and not part.exists()
    turns = sum(len(json.loads(line)["finish_reasons"]) for line in kept.splitlines())
    assert len(second.requests) == sum(i % 3 + 1 for i in range(20)) - turns


def test_a_damaged_line_is_answered_again(undisturbed, run, serve, tmp_path):
    server = serve()
    server.fault = lambda number, body: (503, {}, b"") if number >= 10 else None
    with pytest.raises(ValueError, match="no server"):
        run(server, servers={"retries": 0, "concurrency": 2})
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([lines[0], b"\0" * 40 + b"\n", *lines[2:]]))
    outcome, printed = run(serve())
    assert outcome.complete and "1 damaged lines" in printed and (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_a_signal_ends_it_cleanly(undisturbed, run, serve, prompts, tmp_path):
    process = start(prompts, tmp_path / "out.jsonl", serve(delay_s=0.05))
    wait_for_rows(tmp_path / "out.jsonl.part", 3)
    with pytest.raises(ValueError, match="in use by another process"):
        run(serve())
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "stopped by SIGTERM. The same command goes on from here" in printed and "Traceback" not in printed
    assert run(serve())[0].complete and (tmp_path / "out.jsonl").read_bytes() == undisturbed


# --- a target on this machine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_llama().double())


def local(target, sampling=GREEDY, batch_size=2) -> LocalTarget:
    return LocalTarget(target, make_tokenizer(), sampling, batch_size)


@pytest.fixture
def few(tmp_path) -> list[str]:
    return [str(write_prompts(tmp_path / "few.jsonl", 6))]


def test_a_local_target_answers_as_it_would_alone(run, target, few, tmp_path):
    by = local(target)
    outcome, _ = run(by, paths=few, allow_failures=True)
    assert outcome.complete
    rows, tokenizer = rows_of(tmp_path / "out.jsonl"), by.tokenizer
    assert sum(len(row["messages"]) > 2 for row in rows) >= 2
    for row in rows:
        for k, reason in zip(range(1, len(row["messages"]), 2), row["finish_reasons"], strict=True):
            (ids,) = prompt_ids([Prompt(row["messages"][:k])], tokenizer)
            alone = generate(target, None, ids, 8).tokens
            assert reason == ("stop" if alone[-1] in target.eos_ids else "length")
            said = alone[:-1] if reason == "stop" else alone
            assert row["messages"][k]["content"] == tokenizer.decode(said)
        assert row["length_cut"] == ("length" in row["finish_reasons"])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_local_run_stopped_between_batches_ends_the_same(run, target, few, tmp_path, monkeypatch, temperature):
    sampling = Sampling(temperature, max_new_tokens=5, seed=3)
    by = local(target, sampling)
    run(by, out=tmp_path / "undisturbed.jsonl", paths=few, allow_failures=True)
    original, count = answer_local.answer_batch, [0]

    def interrupted(*arguments, **options):
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(answer_local, "answer_batch", interrupted)
    outcome, printed = run(by, paths=few, allow_failures=True)
    assert outcome.stopped_by == signal.SIGINT and "stopped by SIGINT" in printed
    assert 0 < len(rows_of(tmp_path / "out.jsonl.part")) < 6
    outcome, _ = run(by, paths=few, allow_failures=True)
    assert outcome.complete
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_sampling_reaches_the_local_target(run, target, few, tmp_path):
    answers = set()
    for seed in (1, 2, 2):
        sampling = Sampling(2.0, max_new_tokens=5, seed=seed)
        run(local(target, sampling, 6), paths=few, fresh=True, allow_failures=True)
        answers.add((tmp_path / "out.jsonl").read_bytes())
    assert len(answers) == 2


def test_what_a_local_target_cannot_answer_is_listed(run, target, tmp_path):
    source = tmp_path / "odd.jsonl"
    long = json.dumps({"prompt": " ".join(WORDS[:90] * 6)})
    source.write_text("".join(line + "\n" for line in (long, json.dumps({"prompt": "ba be"}), '{"prompt": "<more>"}')))
    by = local(target)
    by.tokenizer.add_tokens(
        [f"<other {i}>" for i in range(192 - len(by.tokenizer))] + ["<more>"]
    )  # 192 is no row of the target
    outcome, _ = run(by, paths=[str(source)])
    assert outcome.failures == 2
    failures = [row["reason"] for row in rows_of(tmp_path / "out.failures.jsonl")]
    assert failures[0].endswith("leave no 8 of the target's 512; lower --max-new-tokens")
    assert failures[1] == "token id 192 is not in the target's vocabulary of 192"


def test_where_nothing_was_answered_other_settings_may_follow(run, target, few):
    """As the failures advise. Once there are answers, they would be of other settings than the rest."""
    outcome, _ = run(local(target, Sampling(max_new_tokens=600)), paths=few)
    assert not outcome.complete
    run(local(target), paths=few)
    with pytest.raises(ValueError, match="was made with other settings"):
        run(local(target, Sampling(max_new_tokens=9)), paths=few)


@pytest.mark.parametrize(("kwargs", "said"), [(5, "a mapping of names, got 5"), ({"tools": 5}, "not hold tools")])
def test_template_kwargs_of_a_local_target_are_checked(target, kwargs, said):
    with pytest.raises(ValueError, match=said):
        local(target, Sampling(extra_body={"chat_template_kwargs": kwargs}))


def test_special_tokens_in_an_answer_are_no_text(target):
    with pytest.raises(ValueError, match=r"special token <\|im_start\|>"):
        local(target)._text([20, 1, 21, 2])
    assert local(target)._text([20, 21, 2]) == local(target).tokenizer.decode([20, 21])


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def command_line(fastdraft):
    """command_line("--url", ...) -> exit code, what was printed on both streams together."""

    def call(*arguments) -> tuple[int, str]:
        code, out, err = fastdraft("data", "regenerate", *arguments)
        return code, out + err

    return call


def test_the_command_answers(command_line, serve, prompts, tmp_path, undisturbed):
    out = tmp_path / "out.jsonl"
    code, printed = command_line(prompts, "--out", out, "--url", serve().url, "--url", serve().url, "--temperature", 0)
    assert code == 0 and "20/20 conversations" in printed
    assert out.read_bytes() == undisturbed


def test_the_command_answers_with_a_local_target(command_line, target_dir, tmp_path):
    source = tmp_path / "one.jsonl"
    source.write_text('{"prompt": "ba be"}\n')
    options = ["--temperature", 0, "--max-new-tokens", 4, "--dtype", "fp32", "--device", "cpu"]
    code, printed = command_line(source, "--out", tmp_path / "out.jsonl", "--target", target_dir, *options)
    assert code == 0, printed
    settings = json.loads((tmp_path / "out.jsonl.meta.json").read_text())["settings"]
    assert settings["backend"] == "transformers" and settings["dtype"] == "float32" and settings["batch_size"] == 32


def test_the_commands_failures_are_one_line_and_exit_code_1(command_line, serve, prompts, tmp_path):
    out = ("--out", tmp_path / "out.jsonl")
    free = serve()
    free.close()
    for arguments, said in (
        ((prompts, *out), "give either --url (repeatable) or --target"),
        ((prompts, *out, "--url", free.url), "cannot be reached"),
        ((prompts, *out, "--url", "localhost:8000"), "is no server's address"),
        ((tmp_path / "none.jsonl", *out, "--url", serve().url), "none.jsonl: no such file"),
        ((prompts, "--out", tmp_path / "out.txt", "--url", serve().url), "must end in .jsonl"),
        ((prompts, *out, "--target", "x", "--device", "gpu"), "device gpu is not one of auto, cpu, cuda"),
    ):
        code, printed = command_line(*arguments)
        assert code == 1 and said in printed and len(printed.splitlines()) == 1, printed
    broken = serve(fault=lambda number, body: (400, {}, b"no") if number == 0 else None)
    assert command_line(prompts, *out, "--url", broken.url)[0] == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_an_answer_is_not_searched_for_an_error(monkeypatch):
    monkeypatch.setattr("fastdraft.answers.servers.error_text", lambda response: pytest.fail("a good answer was parsed"))
    check_status(httpx.Response(200, request=httpx.Request("POST", "http://x"), content=b"{}"))
