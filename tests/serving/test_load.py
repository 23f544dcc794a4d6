"""`fastdraft bench serve` against servers that answer like SGLang and vLLM, with rounds and counters known beforehand."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict

import httpx
import pytest
from fake_http import FakeHTTP, reply
from tiny import refusal

from fastdraft.data.prompts import Prompt
from fastdraft.serving import client
from fastdraft.serving.load import Load, bench_serve, read_report

STEPS = 3


def rounds(number: int) -> list[int]:
    """Tokens that each verifying forward gives to prompt `number`, the prefill's left out."""
    return [1 + (number * 5 + i * 3) % (STEPS + 1) for i in range(number % 4)]


class Engine(FakeHTTP):
    """A server thread. Class attributes are its faults and habits; tests set them on the instance."""

    engine, version, speculates = "vLLM", "0.32.0", True
    metrics = details = usage = True
    meta_info = False
    short = False  # answers are the prefill's token
    chunk_s = 0.0
    letter = "x"  # of the answers' text
    gathers = 1  # requests wait until so many were in flight at once
    failures = 0  # first requests answered 503
    dies_after = 10**9  # requests; then streams break and nothing listens any more
    trim = 0  # drafted tokens beyond the stop: the counters have them, the answer has not
    plain_forwards = 0  # of each request: give a token, nothing was drafted
    foreign_tokens = 0  # generated for others during the first request
    hangs = refuses = broken = garbage = None  # paths or a flag
    counted = None  # tokens that usage says of each answer, instead of what they are
    info = None  # over what SGLang says of itself
    more_metrics = ""
    plain_answer = None  # instead of a stream
    lists_models = 200  # HTTP status
    last = "\n\n"  # after a stream's last line

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("tokens", "drafts", "accepted"), 100)  # of an earlier life
        self.per_position = [70, 20, 10]
        self.bodies, self.keys, self.in_flight, self.most, self.seen = [], set(), 0, 0, 0
        super().__init__()

    def get(self, handler) -> None:
        if self.hangs == handler.path:
            time.sleep(2.5)
        text = self.page(handler.path)
        status = self.lists_models if handler.path == "/v1/models" else 200
        reply(handler, 404 if text is None else status, text or "")

    def post(self, handler, body: dict) -> None:
        with self.lock:
            self.keys.add(handler.headers["Authorization"])
            self.in_flight += 1
            self.seen += 1
            self.most = max(self.most, self.in_flight)
            self.bodies.append(body)
            mine = self.seen
        try:
            until = time.perf_counter() + 5
            while self.most < self.gathers and time.perf_counter() < until:
                time.sleep(0.002)
            if mine <= self.failures:
                reply(handler, 503, "overloaded")
            elif self.refuses:
                reply(handler, 400, "context too long")
            elif self.plain_answer is not None:
                reply(handler, 200, self.plain_answer, {"Content-Type": "text/html"})
            elif body["stream"]:
                self.stream(handler, body, mine)
            else:
                reply(handler, 200, self.whole(body))
        finally:
            with self.lock:
                self.in_flight -= 1

    def stream(self, handler, body: dict, mine: int) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for chunk in self.answer(body):
            if mine > self.dies_after:
                self.close()
                return
            time.sleep(self.chunk_s)
            end = self.last if chunk == "[DONE]" else "\n\n"
            handler.wfile.write(f"data: {chunk}{end}".encode())
            handler.wfile.flush()

    def page(self, path: str) -> str | None:
        if path == "/v1/models":
            return json.dumps({"data": [{"id": "target", "owned_by": self.engine.lower()}]})
        if path == "/version" and self.engine == "vLLM":
            return json.dumps({"version": self.version})
        if path == "/get_server_info" and self.engine == "SGLang":
            algorithm = "EAGLE3" if self.speculates else None
            info = {"speculative_algorithm": algorithm, "speculative_num_steps": STEPS, "version": self.version}
            return json.dumps(info | (self.info or {}))
        if path == "/metrics" and self.metrics:
            return self.prometheus()
        return None

    def prometheus(self) -> str:
        counts, label = self.counts, '{engine="0",model_name="target"}'
        if self.engine == "vLLM":
            lines = [f"vllm:generation_tokens_total{label} {counts['tokens']}", f"vllm:other_total{label} 7"]
            if self.speculates:
                lines += [f"vllm:spec_decode_num_drafts_total{label} {counts['drafts']}"]
                lines += [f"vllm:spec_decode_num_accepted_tokens_total{label} {counts['accepted']}"]
                lines += [
                    f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{i}"}} {n}'
                    for i, n in enumerate(self.per_position)
                ]
        else:
            lines = [f'sglang:generation_tokens_total{{is_streaming="true"}} {counts["tokens"]}']
        return "".join(f"# TYPE {line.split('{')[0]} counter\n{line}\n" for line in lines) + self.more_metrics

    def answer(self, body: dict):
        """The chunks of a stream. Rounds are counted, as in the engines, before the last is sent."""
        number = int(body["messages"][-1]["content"].split()[-1])
        given = rounds(number) if self.speculates else [1] * sum(rounds(number))
        given = [] if self.short else given + [1] * self.plain_forwards
        total = 1 + sum(given)
        yield json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i, tokens in enumerate([1, *given]):
            if i == len(given):
                self.count(rounds(number) if self.speculates and not self.short else [], total)
            chunk = {"choices": [{"delta": {"content": self.letter * tokens}}], "usage": None}
            yield "<html>" if self.garbage else json.dumps(chunk, ensure_ascii=False)
        if self.engine == "SGLang" and self.details and body.get("return_spec_tokens_details") and given:
            yield json.dumps({"choices": [], "sglext": {"spec_tokens_details": self.spec(number)}})
        if self.broken:
            return
        if self.usage:
            yield json.dumps(
                {"choices": [], "usage": {"completion_tokens": total if self.counted is None else self.counted}}
            )
        yield "[DONE]"

    def spec(self, number: int) -> dict:
        histogram = [rounds(number).count(n + 1) for n in range(max(rounds(number)))]
        return {"spec_verify_ct": len(rounds(number)), "spec_correct_drafts_histogram": histogram}

    def whole(self, body: dict) -> str:
        """An answer that does not stream."""
        number = int(body["messages"][-1]["content"].split()[-1])
        self.count(rounds(number), 1 + sum(rounds(number)))
        told = self.meta_info and body["return_meta_info"] and rounds(number)
        choice = {"message": {"content": "x"}} | ({"meta_info": {"id": "a", **self.spec(number)}} if told else {})
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": 1 + sum(rounds(number))}})

    def count(self, given: list[int], total: int) -> None:
        with self.lock:
            kept = [tokens - 1 for tokens in given]
            if kept:
                kept[-1] = min(STEPS, kept[-1] + self.trim)
            self.counts["tokens"] += total + self.foreign_tokens
            self.counts["drafts"] += len(given)
            self.counts["accepted"] += sum(kept)
            for position in range(STEPS):
                self.per_position[position] += sum(n > position for n in kept)
            self.foreign_tokens = 0


@pytest.fixture
def engine():
    """engine("vLLM", chunk_s=0.1) -> a running server."""
    made = []

    def make(kind: str = "vLLM", **habits) -> Engine:
        made.append(Engine())
        for name, value in {"engine": kind, **habits}.items():
            assert hasattr(Engine, name)
            setattr(made[-1], name, value)
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(*numbers: int) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": f"prompt {n}"}]) for n in numbers]


NUMBERS = tuple(range(12))
GIVEN = [tokens for n in NUMBERS for tokens in rounds(n)]
BY_DEPTH = [sum(tokens > depth + 1 for tokens in GIVEN) / len(GIVEN) for depth in range(STEPS)]
QUICK = {"num_warmup": 1, "timeout_s": 10.0, "retries": 1}


def test_the_rounds_of_the_test_tell_numbers_apart():
    assert len(GIVEN) == 18 and len(set(BY_DEPTH)) == STEPS and BY_DEPTH[-1] > 0 and rounds(4) == []


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_numbers_are_those_of_the_measured_window(engine, kind):
    server = engine(kind)
    report = bench_serve(server.url, {"set": ask(*NUMBERS)}, Load((1, 4), **QUICK))
    assert (report.server.engine, report.server.version, report.server.speculates) == (kind, "0.32.0", True)
    assert [c.concurrency for c in report.cells] == [1, 4] and report.notes == []
    for cell in report.cells:
        m, a = cell.measured, cell.measured.acceptance
        assert (m.num_requests, m.num_retries, m.num_output_tokens) == (12, 0, 12 + sum(GIVEN))
        assert m.output_tokens_per_s == pytest.approx(m.num_output_tokens / m.seconds)
        assert a.num_forwards == len(GIVEN) and a.accepted_length == sum(GIVEN) / len(GIVEN)
        own = sum(GIVEN) / len(GIVEN) if kind == "vLLM" else (12 + sum(GIVEN)) / len(GIVEN)
        assert a.engine_accept_length == pytest.approx(own) and a.step_acceptance == pytest.approx(BY_DEPTH)
    body = server.bodies[-1]
    assert body["stream_options"]["include_usage"] and body["max_tokens"] == 256 and body["temperature"] == 0
    assert ("return_spec_tokens_details" in body) == (kind == "SGLang")
    salts = [b["cache_salt"] for b in server.bodies]
    assert len(set(salts)) == 3 and len(set(salts[1:13])) == 1  # warm-up and two cells


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_in_flight_than_asked(engine, concurrency):
    server = engine(chunk_s=0.002, gathers=concurrency)
    bench_serve(server.url, {"set": ask(*NUMBERS)}, Load((concurrency,), num_warmup=0))
    assert server.most == concurrency and server.seen == 12


def test_tokens_past_the_stop_are_in_vllms_ratio_only(engine):
    acceptance = bench_serve(engine(trim=2).url, {"set": ask(3, 7)}, Load(**QUICK)).cells[0].measured.acceptance
    given = rounds(3) + rounds(7)
    past = sum(min(STEPS, r[-1] + 1) - r[-1] + 1 for r in (rounds(3), rounds(7)))
    assert acceptance.accepted_length == sum(given) / len(given)
    assert acceptance.engine_accept_length == pytest.approx((sum(given) + past) / len(given)) and past


def test_forwards_without_a_draft_count_as_forwards(engine):
    report = bench_serve(engine(plain_forwards=2).url, {"set": ask(3, 7)}, Load(**QUICK))
    given = rounds(3) + rounds(7) + [1] * 4
    assert report.cells[0].measured.acceptance.accepted_length == sum(given) / len(given)
    assert "nothing drafted" in " ".join(report.notes)


def test_others_requests_are_noticed(engine):
    report = bench_serve(engine(foreign_tokens=50).url, {"set": ask(3, 7)}, Load(num_warmup=0))
    said = " ".join(report.notes)
    assert "+50 tokens" in said and "1 + accepted / drafts" in said
    assert report.cells[0].measured.acceptance.accepted_length == pytest.approx(sum(rounds(3) + rounds(7)) / 6)


@pytest.mark.parametrize(
    ("kind", "habits", "length", "said"),
    [
        ("vLLM", {"metrics": False}, None, "no vllm: counters in /metrics"),
        ("vLLM", {"speculates": False}, None, "runs without speculation"),
        ("SGLang", {"speculates": False}, None, "runs without speculation"),
        ("SGLang", {"short": True}, None, "verified nothing"),
        ("vLLM", {"short": True}, None, "verified nothing"),
        ("SGLang", {"details": False}, None, "reports no verifying forwards by request"),
    ],
)
def test_what_a_server_does_not_report_is_said(engine, kind, habits, length, said):
    report = bench_serve(engine(kind, **habits).url, {"set": ask(*NUMBERS)}, Load(**QUICK))
    acceptance = report.cells[0].measured.acceptance
    assert (acceptance and acceptance.accepted_length) == length and any(said in note for note in report.notes)
    assert report.cells[0].measured.output_tokens_per_s > 0


def test_a_server_that_describes_itself_wrongly_is_measured_all_the_same(engine):
    """Else: a TypeError, an OverflowError, or as many zeros as it says it has steps."""
    for steps in ("3", [3], 10**12):
        cell = bench_serve(
            engine("SGLang", info={"speculative_num_steps": steps}).url, {"set": ask(*NUMBERS)}, Load(**QUICK)
        ).cells[0]
        assert cell.measured.acceptance.step_acceptance == pytest.approx(BY_DEPTH)
    odd = 'vllm:spec_decode_num_drafts_total{engine="1"} +Inf\n'
    odd += 'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="x"} 3\n'
    cell = bench_serve(engine(more_metrics=odd).url, {"set": ask(*NUMBERS)}, Load(**QUICK)).cells[0]
    assert cell.measured.acceptance.accepted_length == sum(GIVEN) / len(GIVEN)


def test_a_stream_may_end_with_its_last_line(engine):
    assert bench_serve(engine(last="").url, {"set": ask(3)}, Load(**QUICK)).cells[0].measured.num_retries == 0


def test_answers_without_text_are_noted(engine):
    report = bench_serve(engine(letter="").url, {"set": ask(3, 7)}, Load(**QUICK))
    assert report.cells[0].measured.first_token_ms is None
    assert any("streamed no text for 2 of 2 requests" in note for note in report.notes)


def test_an_older_sglang_counts_in_an_unstreamed_pass(engine):
    server = engine("SGLang", details=False, metrics=False, meta_info=True)
    report = bench_serve(server.url, {"set": ask(*NUMBERS)}, Load((3,), num_warmup=0))
    m = report.cells[0].measured
    assert m.acceptance.accepted_length == sum(GIVEN) / len(GIVEN)
    assert m.acceptance.step_acceptance == pytest.approx(BY_DEPTH) and m.num_requests == 12
    assert server.seen == 24 and server.most <= 3 and "second, unstreamed pass" in report.notes[0]


def test_a_prompts_tools_are_asked_with_it(engine):
    server, (plain,) = engine(), ask(3)
    tool = {"type": "function", "function": {"name": "weather"}}
    report = bench_serve(server.url, {"with": [plain._replace(tools=[tool])], "without": [plain]}, Load(num_warmup=0))
    assert [body.get("tools") for body in server.bodies] == [[tool], None]
    assert len({cell.prompts_sha256 for cell in report.cells}) == 2


def test_latencies(engine):
    m = bench_serve(engine(chunk_s=0.02).url, {"set": ask(3, 7)}, Load(**QUICK)).cells[0].measured
    assert 40 <= m.first_token_ms.p50 < m.end_to_end_ms.p50 - 60  # two chunks: the role's, then text
    assert 120 <= m.end_to_end_ms.p50 <= m.end_to_end_ms.p99
    after_first = [3 * 20 / sum(rounds(n)) for n in (3, 7)]  # three later chunks, which tokens share
    assert min(after_first) <= m.per_token_ms.p50 <= m.per_token_ms.p90 <= m.per_token_ms.p99 < m.end_to_end_ms.p50
    silent = bench_serve(engine(short=True).url, {"set": ask(3)}, Load(**QUICK)).cells[0].measured
    assert silent.per_token_ms is None and silent.first_token_ms is not None


def test_a_line_of_a_stream_ends_at_a_newline_only(engine):
    """Unicode knows more ends of lines, and the engines do not escape them."""
    m = bench_serve(engine(letter="\u2028\x85").url, {"set": ask(3, 7)}, Load(**QUICK)).cells[0].measured
    assert m.num_output_tokens == 2 + sum(rounds(3) + rounds(7))


def test_baselines_beside_and_from_a_file(engine, tmp_path):
    fast, slow = engine(), engine(speculates=False, chunk_s=0.005)
    sets = {"a": ask(*NUMBERS), "b": ask(3)}
    beside = bench_serve(fast.url, sets, Load((1, 2), **QUICK), baseline_url=slow.url + "/v1/")
    assert [(c.prompts, c.concurrency) for c in beside.cells] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    for cell in beside.cells:
        assert cell.speedup == cell.measured.output_tokens_per_s / cell.baseline.output_tokens_per_s
        assert cell.baseline.num_output_tokens == cell.measured.num_output_tokens
    assert beside.notes == ["prompts in b: 1, so never more than that many in flight"]

    file = tmp_path / "serve.json"
    file.write_text(json.dumps(asdict(bench_serve(slow.url, sets, Load((2, 1), **QUICK)))))
    earlier = read_report(file)
    later = bench_serve(fast.url, {"renamed": sets["b"]}, Load((2,), **QUICK), baseline=earlier)
    assert later.cells[0].baseline == earlier.cells[2].measured and later.baseline_server.url == slow.url
    for load, prompts, said in (
        (Load((4,)), sets, "no cell with the prompts of a at concurrency 4"),
        (Load((1,)), {"a": ask(5)}, "no cell"),
        (Load((1,), max_new_tokens=8), sets, "max_new_tokens 256, this run has 8"),
    ):
        with pytest.raises(ValueError, match=said):
            bench_serve(fast.url, prompts, load, baseline=earlier)
    with pytest.raises(ValueError, match="not both"):
        bench_serve(fast.url, sets, Load(), baseline_url=slow.url, baseline=earlier)


def test_a_baseline_that_speculates_is_noted(engine):
    notes = bench_serve(engine().url, {"a": ask(3)}, Load(**QUICK), baseline_url=engine("SGLang").url).notes
    assert any("speculates: then the speed-up is not over the target alone" in note for note in notes)


# --- servers that fail ---------------------------------------------------------------------------------------------------


def test_retries_are_bounded_and_counted(engine):
    server = engine(failures=1)
    report = bench_serve(server.url, {"a": ask(3, 7)}, Load(num_warmup=0, retries=1))
    assert report.cells[0].measured.num_retries == 1 and server.seen == 3
    assert any("1 times a request was sent again" in note for note in report.notes)
    server = engine(failures=99)
    with pytest.raises(ValueError, match=r"a request failed 2 times, at last: .*: HTTP 503: overloaded"):
        bench_serve(server.url, {"a": ask(3, 7)}, Load(num_warmup=0, retries=1))
    assert server.seen == 2


@pytest.mark.parametrize(
    ("habits", "said"),
    [
        ({"dies_after": 3}, "a request failed 2 times, at last: .*: Connect"),
        ({"broken": True}, "no whole stream of events: it ended without"),
        ({"refuses": True}, "HTTP 400: context too long"),
        ({"garbage": True}, "answers what is no chat completion: <html>"),
        ({"usage": False}, "does not report how many tokens"),
        ({"counted": -3}, "answers what is no chat completion"),
        ({"counted": 10**12}, "reports 1000000000000 tokens of an answer where 256 were asked for"),
        ({"plain_answer": "<html>"}, "failed 2 times, at last: .* the answer \\(text/html\\) is no whole stream of events"),
        ({"lists_models": 503}, "/v1/models: HTTP 503: .*; is the server ready"),
        ({"engine": "TGI", "metrics": False}, "neither SGLang .* nor vLLM"),
        ({"hangs": "/v1/models"}, "/v1/models does not answer within 1 s"),
        ({"chunk_s": 0.8}, "no whole answer to a request within 1.5 s"),
    ],
)
def test_a_server_that_fails_is_one_sentence_and_no_hang(engine, monkeypatch, habits, said):
    monkeypatch.setattr(client, "PROBE_S", 1.0)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=said):
        bench_serve(engine(**habits).url, {"a": ask(*NUMBERS)}, Load((2,), num_warmup=1, timeout_s=1.5, retries=1))
    assert time.perf_counter() - started < 10


def test_a_server_too_busy_to_connect_is_asked_again():
    asked = []

    def busy(request):
        asked.append(request)
        raise httpx.ConnectTimeout("")

    async def ask_busy():
        async with httpx.AsyncClient(base_url="http://busy", transport=httpx.MockTransport(busy)) as http:
            await client.ask_all(http, [{"stream": True}], 1, timeout_s=300, retries=1)

    with pytest.raises(ValueError, match=r"failed 2 times, at last: .*: ConnectTimeout"):
        asyncio.run(ask_busy())
    assert len(asked) == 2


def test_counters_that_go_backwards_are_a_restart(engine):
    server = engine()
    original, server.answer = server.answer, lambda body: server.counts.update(drafts=0) or original(body)
    with pytest.raises(ValueError, match="went backwards"):
        bench_serve(server.url, {"a": ask(3)}, Load(**QUICK))


# --- the command ---------------------------------------------------------------------------------------------------------


def write_prompts(path, numbers):
    path.write_text("".join(json.dumps({"id": n, "prompt": f"prompt {n}"}) + "\n" for n in numbers))
    return path


def test_the_command_writes_tables_and_json(engine, fastdraft, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MY_KEY", "secret")
    server, plain = engine("SGLang"), engine("SGLang", speculates=False)
    one, two = write_prompts(tmp_path / "one.jsonl", NUMBERS), write_prompts(tmp_path / "two.jsonl", (3, 7, 11))
    command = ("bench", "serve", "--url", server.url, "--baseline-url", plain.url, "--prompts", one, "--prompts", two)
    load = ("--concurrency", "1,2", "--max-prompts", 12, "--body", '{"top_k": 1}', "--api-key-env", "MY_KEY")
    code, out, err = fastdraft(*command, *load, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"{sum(GIVEN) / len(GIVEN):.3f}" in out and " ".join(f"{share:.2f}" for share in BY_DEPTH) in out
    assert server.keys == plain.keys == {"Bearer secret"}
    assert "tokens per verifying forward of the target" in out and "EAGLE3" in out and "baseline" in out
    report = read_report(tmp_path / "out" / "serve.json")
    assert [c.prompts for c in report.cells] == ["one", "one", "two", "two"] and server.bodies[0]["top_k"] == 1
    assert out.count(f"{report.cells[0].speedup:.2f}x") >= 1 and "1.00x" in out and " / " in out

    code, out, err = fastdraft(
        "bench", "serve", "--url", plain.url, "--prompts", two, "--baseline", tmp_path / "out/serve.json"
    )
    assert code == 1 and "top_k" in err
    code, out, err = fastdraft("bench", "serve", "--url", plain.url, "--prompts", two, "--out", tmp_path / "plain")
    assert code == 0 and "no draft" in out and "runs without speculation" in out
    assert f"wrote {tmp_path / 'plain' / 'serve.json'}" in out.replace("\n", "")


def test_cells_measured_before_a_death_are_kept(engine, fastdraft, tmp_path):
    server = engine(dies_after=2 + 3 + 1)
    prompts = write_prompts(tmp_path / "p.jsonl", (1, 2, 3))
    command = ("bench", "serve", "--url", server.url, "--prompts", prompts, "--concurrency", "1,2", "--retries", 0)
    assert "a request failed 1 times" in refusal(fastdraft(*command, "--out", tmp_path))
    assert [c.concurrency for c in read_report(tmp_path / "serve.json").cells] == [1]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_asked(engine, fastdraft, tmp_path):
    server, prompts = engine(), write_prompts(tmp_path / "p.jsonl", (1,))
    said = refusal(fastdraft("bench", "serve", "--url", server.url, "--prompts", prompts, "--out", prompts))
    assert "p.jsonl" in said and server.seen == 0


def test_bad_input_is_one_red_line(fastdraft, tmp_path, monkeypatch):
    prompts, empty = write_prompts(tmp_path / "p.jsonl", (1,)), write_prompts(tmp_path / "empty.jsonl", ())
    (tmp_path / "other").mkdir()
    same = write_prompts(tmp_path / "other" / "p.jsonl", (1,))
    (tmp_path / "bad.json").write_text('{"cells": 3}')

    def said(*options, url="http://127.0.0.1:9"):
        return refusal(fastdraft("bench", "serve", "--url", url, *options))

    assert "empty.jsonl: empty" in said("--prompts", empty)
    assert "http://127.0.0.1:9/v1/models cannot be reached" in said("--prompts", prompts)
    assert "give one like http://" in said("--prompts", prompts, url="localhost:8000")
    assert "like 1,4,16" in said("--prompts", prompts, "--concurrency", "1;2")
    assert "each once" in said("--prompts", prompts, "--concurrency", "4,4")
    assert "at least 1" in said("--prompts", prompts, "--concurrency", "0")
    assert "max_new_tokens must be at least 2, not 1" in said("--prompts", prompts, "--max-new-tokens", 1)
    assert "--body must be a JSON object" in said("--prompts", prompts, "--body", "[1]")
    assert "body is not JSON" in said("--prompts", prompts, "--body", "{")
    own = '{"n": 2, "max_tokens": 9, "seed": 1}'
    assert "body is not JSON" in said("--prompts", prompts, "--body", '{"x": NaN}')
    assert "body is not JSON" in said("--prompts", prompts, "--body", "[" * 10**5)
    assert "temperature must be at least 0, not nan" in said("--prompts", prompts, "--temperature", "nan")
    assert "timeout_s must be at least 0.1, not nan" in said("--prompts", prompts, "--timeout", "nan")
    assert "give one like http://" in said("--prompts", prompts, url="http://localhost:99999")
    assert "give one like http://" in said("--prompts", prompts, url="http://localhost?x=1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    refused = said("--prompts", prompts)
    assert "the API key holds what no header may" in refused and "secret" not in refused
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "body must not hold max_tokens, n" in said("--prompts", prompts, "--body", own)
    assert "have one name" in said("--prompts", prompts, "--prompts", same)
    assert "bad.json is no serve.json" in said("--prompts", prompts, "--baseline", tmp_path / "bad.json")
    assert "none.json" in said("--prompts", prompts, "--baseline", tmp_path / "none.json")
