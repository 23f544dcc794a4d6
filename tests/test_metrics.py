"""What a run writes and prints while it trains."""

import io
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import ValidationError
from rich.console import Console

from fastdraft.metrics import Metrics, MetricsConfig, numbers_line, read_metrics

PLAIN = MetricsConfig(log_every=2, tensorboard=False)
VALUES = {"loss": 2.5, "tau_sim": 2.31, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 9412.4} | {
    f"a{i}": 0.7 - 0.05 * i for i in range(7)
}


def terminal(width, is_terminal=True):
    return Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_log_is_one_line_on_disk_at_once(tmp_path):
    with Metrics(tmp_path / "run", PLAIN, 10) as metrics:
        metrics.log(1, VALUES)
        assert [line["step"] for line in lines(tmp_path / "run")] == [1]
        metrics.log(2, {"loss": 1.0, "eval/tau_sim": 2.0})
    first, second = lines(tmp_path / "run")
    assert {name: first[name] for name in VALUES} == VALUES
    assert second["eval/tau_sim"] == 2.0 and second["time"] >= first["time"] > 1e9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_becomes_null(tmp_path, bad):
    with Metrics(tmp_path, PLAIN, 10) as metrics:
        metrics.log(1, {"loss": bad, "lr": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["lr"] == 0.5


def test_resume_cuts_what_comes_again(tmp_path):
    with Metrics(tmp_path, PLAIN, 10) as metrics:
        for step in range(1, 8):
            metrics.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with Metrics(tmp_path, PLAIN, 10, resume_step=4) as metrics:
        for step in range(5, 11):
            metrics.log(step, {"loss": -float(step)})
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["loss"] for r in records] == [1, 2, 3, 4, -5, -6, -7, -8, -9, -10]


def test_a_new_run_starts_an_empty_file(tmp_path):
    for loss in (1.0, 2.0):
        with Metrics(tmp_path, PLAIN, 10) as metrics:
            metrics.log(1, {"loss": loss})
    assert [r["loss"] for r in read_metrics(tmp_path)] == [2.0]


@pytest.mark.parametrize("middle", ["{torn", '{"loss": 1.0}', "[1]", '{"step": "one"}'])
def test_a_bad_line_is_named(tmp_path, middle):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{middle}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2"):
        read_metrics(tmp_path)


def test_no_metrics_is_said(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_values_and_resumes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig()
    with Metrics(tmp_path, config, 10) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"loss": float(step), "eval/loss": 0.5})
    with Metrics(tmp_path, config, 10, resume_step=1) as metrics:
        metrics.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_tracker_names_its_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        Metrics(tmp_path / "run", MetricsConfig(trackers=[name]), 10)
    assert not (tmp_path / "run").exists()


def fake_tracker(name, calls):
    module = ModuleType(name)

    def note(function, result=None):
        return lambda *args, **kwargs: calls.append((function, args, kwargs)) or result

    started = SimpleNamespace(id="run-7", info=SimpleNamespace(run_id="run-7"))
    functions = {
        "wandb": ("init", "log", "finish"),
        "trackio": ("init", "log", "finish"),
        "mlflow": ("set_experiment", "start_run", "log_dict", "log_metrics", "end_run"),
    }
    for function in functions[name]:
        setattr(module, function, note(function, started))
    return module


@pytest.mark.parametrize(
    ("name", "log", "end"),
    [
        ("wandb", "log", "finish"),
        ("trackio", "log", "finish"),
        ("mlflow", "log_metrics", "end_run"),
    ],
)
def test_trackers_get_every_value_and_are_closed(tmp_path, monkeypatch, name, log, end):
    calls = []
    monkeypatch.setitem(sys.modules, name, fake_tracker(name, calls))
    config = MetricsConfig(tensorboard=False, trackers=[name], run_name="first")
    with pytest.raises(RuntimeError), Metrics(tmp_path, config, 10, settings={"lr": 1}) as metrics:
        metrics.log(3, {"loss": 0.25})
        raise RuntimeError
    assert (log, ({"loss": 0.25},), {"step": 3}) in calls
    assert calls[-1][0] == end
    calls.clear()
    with Metrics(tmp_path, config, 10, resume_step=3):
        pass
    again = {key: value for _, _, kwargs in calls for key, value in kwargs.items()}
    if name == "trackio":  # it finds the run by project and name
        assert (again["project"], again["name"], again["resume"]) == ("fastdraft", "first", "allow")
    else:
        assert "run-7" in (again.get("id"), again.get("run_id"))


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console = terminal(40, is_terminal=False)
    with Metrics(tmp_path, PLAIN, 5, console=console) as metrics:
        metrics.say("target: [135M] parameters, loaded")
        for step in range(1, 6):
            metrics.log(step, VALUES)
        metrics.log(5, {"eval/tau_sim": 1.75, "eval/loss": 3.0})
    text = console.file.getvalue()
    out = text.splitlines()
    assert "\x1b" not in text and "\r" not in text
    assert out[0] == "target: [135M] parameters, loaded"
    assert [line.split()[1] for line in out[1:]] == ["2/5", "4/5", "5/5", "5"]
    for part in ("ETA 0:00:0", "9,412 tok/s", "loss 2.500", "tau 2.310", "a 0.70 0.65", "lr 1.00e-04", "|g| 0.5"):
        assert part in out[1]
    assert out[-1] == "step 5  held-out  loss 3.000  tau 1.750"


def test_a_run_of_many_lifetimes_has_no_date(tmp_path):
    out = io.StringIO()
    with Metrics(tmp_path, MetricsConfig(tensorboard=False, log_every=1), 10**9, console=Console(file=out)) as metrics:
        metrics._start -= 10**6
        metrics.log(1, {"loss": 1.0})
    assert "step 1/1000000000  ETA over a century" in out.getvalue()


@pytest.mark.parametrize("width", [8, 20, 40, 80, 160])
def test_the_live_lines_fit_any_terminal(tmp_path, width):
    console = terminal(width)
    with Metrics(tmp_path, PLAIN, 5, console=console) as metrics:
        metrics.log(1, VALUES)
        metrics.log(4, VALUES)
        seen = terminal(width)
        seen.print(metrics._live.renderable)
    out = seen.file.getvalue().splitlines()
    assert len(out) == 2 and max(map(len, out)) <= width
    if width >= 80:
        assert "4/5" in out[0] and "ETA" in out[0] and "tok/s" in out[0]
        assert out[1].startswith("loss 2.500  tau 2.310  a 0.70 0.65 0.60 0.55 0.50 0.45 0.40")


def test_numbers_line_sorts_steps_and_survives_nan():
    line = numbers_line({f"a{i}": i / 100 for i in (10, 2, 1)} | {"loss": math.nan, "alpha": 3.0})
    assert line == "loss nan  a 0.01 0.02 0.10"


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="log_evry"):
        MetricsConfig(log_evry=1)
    with pytest.raises(ValidationError, match="trackers"):
        MetricsConfig(trackers=["neptune"])
    with pytest.raises(ValidationError, match="log_every"):
        MetricsConfig(log_every=0)
