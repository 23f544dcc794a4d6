"""What a run says while it trains: metrics.jsonl, TensorBoard, the trackers asked for, and one live progress line.

A line of metrics.jsonl is {"step": optimizer steps done, "time": unix seconds, name: number or null, ...}. The names
the progress line and the report know, each also with "eval/" before it for held-out data:

    loss           mean loss of step 0's live rows and, weighed by loss.step_decay^i, of the later steps'
    a0, a1, ...    acceptance of TTT step i, 0..1, over the rows trained on; left out where there was none
    tau_sim        simulated accepted length, tokens per target forward, of the steps before the first without a row
    tokens_per_s   packed training tokens per second
    data_wait      share of the time that training waited for its packs, 0..1
    checkpoint_wait  share of the time that training stood still for checkpoints, 0..1: each is copied, once the one before
                   is written; what an evaluation does, and the wait for the last one, are not in it
    lr, grad_norm  learning rate; gradient norm before clipping
    mfu            share of the GPUs' dense bf16 FLOP/s that the target's weights and the trained tokens' draft steps use,
                   by the arithmetic of `--plan`; only where `cost.py` PEAK_FLOPS has the GPU and the target has no experts

Of several processes also

    tokens_per_s_gpu  the same for each process
    wait_reduce       share of the time that even the slowest process waits for sums and weights of the others, 0..1
    wait_slowest      mean share of the time that a process waits beyond that, for slower ones, 0..1

Any other name is written and tracked too. NaN and infinity have no JSON spelling and become null there.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from fastdraft.files import write_file

TrackerName = Literal["wandb", "trackio", "mlflow"]
LONG = 100 * 365.25 * 86400  # seconds; far below what timedelta holds


class MetricsConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    log_every: int = Field(default=10, gt=0)  # optimizer steps
    tensorboard: bool = True
    trackers: list[TrackerName] = []
    project: str = "fastdraft"
    run_name: str | None = None  # the run folder's name when left out


class Metrics:
    """Context manager of the one process that reports. `log` takes plain numbers: whoever calls it pays the host sync.

    `resume_step`: optimizer steps of the checkpoint being resumed; later lines of metrics.jsonl are cut, they will come
    again. None starts the file anew.
    Raises ValueError when a tracker's package is missing, before anything is written.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: MetricsConfig,
        total_steps: int,
        resume_step: int | None = None,
        settings: dict[str, Any] | None = None,  # the run's resolved config, shown by the trackers
        console: Console | None = None,
    ):
        self.run_dir, self.config, self.total_steps = Path(run_dir), config, total_steps
        self.resume_step, self.settings = resume_step, settings or {}
        self.console = console or Console()
        self.latest: dict[str, float] = {}
        self._modules = {name: _import_tracker(name) for name in config.trackers}
        self._logs: list[Callable[[dict[str, float], int], None]] = []
        self._closes: list[Callable[[], None]] = []
        self._live: Live | None = None

    def __enter__(self) -> Metrics:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        _cut(path, self.resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._closes.append(self._file.close)
        try:
            if self.config.tensorboard:
                self._start_tensorboard()
            self._start_trackers()
        except BaseException:
            self._close(failed=True)
            raise
        self._start, self._first_step = time.monotonic(), self.resume_step or 0
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=40)),
                TextColumn("{task.fields[tail]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=self.total_steps, completed=self._first_step, tail="")
            self._progress.update(self._task, tail=self._tail(self._first_step))
            self._numbers = Text("", no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._progress, self._numbers), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close(failed=kind is not None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records the values of optimizer step `step` (steps done, so the last is total_steps)."""
        values = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **line}, allow_nan=False) + "\n")
        self._file.flush()
        for log in self._logs:
            log(values, step)
        self.latest.update(values)
        self._show(step, values)

    def say(self, text: str) -> None:
        """Prints a line above the bar, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # --- the console ---------------------------------------------------------------------------------------------

    def _show(self, step: int, values: dict[str, float]) -> None:
        held_out = {name.removeprefix("eval/"): v for name, v in values.items() if name.startswith("eval/")}
        if held_out:
            self.say(f"step {step}  held-out  {numbers_line(held_out)}")
        if self._live:
            self._progress.update(self._task, completed=step, tail=self._tail(step))
            self._numbers.plain = numbers_line(self.latest)
        elif step % self.config.log_every == 0 or step == self.total_steps:
            line = numbers_line({name: v for name, v in values.items() if not name.startswith("eval/")})
            if line:
                self.say(f"step {self._tail(step)}  {line}")

    def _tail(self, step: int) -> str:  # "120/600  ETA 0:03:10  9,412 tok/s"
        done = step - self._first_step
        parts = [f"{step}/{self.total_steps}"]
        if done > 0:
            seconds = (time.monotonic() - self._start) / done * max(self.total_steps - step, 0)
            parts.append(f"ETA {timedelta(seconds=round(seconds))}" if seconds < LONG else "ETA over a century")
        if "tokens_per_s" in self.latest:
            parts.append(f"{self.latest['tokens_per_s']:,.0f} tok/s")
        return "  ".join(parts)

    # --- where numbers go ----------------------------------------------------------------------------------------

    def _start_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

        purge = 0 if self.resume_step is None else self.resume_step + 1
        writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=purge)

        def log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
            writer.flush()

        self._logs.append(log)
        self._closes.append(writer.close)

    def _start_trackers(self) -> None:
        """Each tracker through its public API; trackers.json remembers the ids, so a resumed run stays the same run.

        Not through accelerate.tracking: its classes ask for accelerate's PartialState, which sets the process's device and
        may set its number of threads or make a process group.
        """
        ids_path = self.run_dir / "trackers.json"
        resumed = self.resume_step is not None
        ids: dict[str, str] = json.loads(ids_path.read_text()) if resumed and ids_path.exists() else {}
        name, project = self.config.run_name or self.run_dir.resolve().name, self.config.project
        if "wandb" in self._modules:
            wandb = self._modules["wandb"]
            run = wandb.init(
                project=project,
                name=name,
                dir=str(self.run_dir),
                config=self.settings,
                id=ids.get("wandb"),
                resume="allow" if "wandb" in ids else None,
            )
            ids["wandb"] = run.id
            self._logs.append(lambda values, step: wandb.log(values, step=step))
            self._closes.append(wandb.finish)
        if "trackio" in self._modules:
            trackio = self._modules["trackio"]
            trackio.init(project=project, name=name, config=self.settings, resume="allow" if resumed else "never")
            self._logs.append(lambda values, step: trackio.log(values, step=step))
            self._closes.append(trackio.finish)
        if "mlflow" in self._modules:
            mlflow = self._modules["mlflow"]
            mlflow.set_experiment(project)
            if "mlflow" in ids:
                mlflow.start_run(run_id=ids["mlflow"])
            else:
                ids["mlflow"] = mlflow.start_run(run_name=name).info.run_id
                mlflow.log_dict(self.settings, "config.json")
            self._logs.append(lambda values, step: mlflow.log_metrics(values, step=step))
            self._closes.append(mlflow.end_run)
        if ids:
            ids_path.write_text(json.dumps(ids))

    def _close(self, failed: bool) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        errors = []
        while self._closes:
            try:
                self._closes.pop()()
            except Exception as error:  # one tracker that cannot close must not keep the others open
                errors.append(error)
        if errors and not failed:
            raise errors[0]


def numbers_line(values: dict[str, float]) -> str:
    """Loss, tau_sim, acceptance by step, learning rate and gradient norm in one line; what is absent is left out."""
    parts = [f"{name} {values[key]:.3f}" for name, key in (("loss", "loss"), ("tau", "tau_sim")) if key in values]
    steps = sorted(int(name[1:]) for name in values if name[:1] == "a" and name[1:].isdigit())
    if steps:
        parts.append("a " + " ".join(f"{values[f'a{i}']:.2f}" for i in steps))
    if "lr" in values:
        parts.append(f"lr {values['lr']:.2e}")
    if "grad_norm" in values:
        parts.append(f"|g| {values['grad_norm']:.3g}")
    return "  ".join(parts)


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in order, without a last one torn by a crash. Raises ValueError for any other bad line."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing; is {run_dir} the folder of a training run?")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a whole number of steps")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path} line {number}: {error}") from None
        records.append(record)
    return records


def _cut(path: Path, resume_step: int | None) -> None:
    """Leaves the lines up to `resume_step` (none when None), in a new file that replaces the old one."""
    if not path.exists():
        return
    keep = [] if resume_step is None else [r for r in read_metrics(path.parent) if r["step"] <= resume_step]
    write_file(path, ((json.dumps(record, allow_nan=False) + "\n").encode() for record in keep))


def _import_tracker(name: TrackerName) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(
            f"metrics.trackers asks for {name}, which is not installed; run `pip install {name}` or take it out of the list"
        ) from None
