"""The command line, also as `python -m fastdraft.cli`. Each command calls one function of the room it names; what a user
can cause becomes one line and exit code 1."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

try:
    import typer
    from rich.console import Console
    from rich.table import Table

    from fastdraft import threads_beside_others
    from fastdraft.dist.watch import StoppedEarly
except KeyboardInterrupt:  # Ctrl-C before anything has begun; later, typer and the commands see to it
    sys.exit(130)

app = typer.Typer(
    help="Train draft models for speculative decoding (EAGLE-3, DFlash, DFlash2, DSpark) that SGLang and vLLM load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data = typer.Typer(help="Answers of the target, a look at training data, and tokenising it once.", no_args_is_help=True)
app.add_typer(data, name="data")
bench = typer.Typer(help="Measure a draft where it serves.", no_args_is_help=True)
app.add_typer(bench, name="bench")
features = typer.Typer(help="Run the target once, train from its features many times.", no_args_is_help=True)
app.add_typer(features, name="features")
console = Console()
COMPUTING = ("train", "evaluate", "data", "features")  # the other commands start engines, which would get our environment
_SHOW_WARNING = warnings.showwarning


@app.callback()
def settle_threads(context: typer.Context) -> None:
    if context.invoked_subcommand in COMPUTING:
        os.environ.update(threads_beside_others())


def say(line: str) -> None:
    """A line as it is, however wide: paths and sentences stay whole in a pipe."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say_aside(line: str) -> None:
    """The same to standard error, for a command whose standard output is read by programs."""
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def refuse_idle(context: typer.Context, options: tuple[str, ...], belong_to: str) -> None:
    """ValueError for options that were given and would do nothing."""
    given = [name for name in options if context.get_parameter_source(name).name == "COMMANDLINE"]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} belong{'s' if len(given) == 1 else ''} to {belong_to}, which was not given")


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUBKEY=VALUE]...", help="Win over the file.")]


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the resolved config and what it will cost; train nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run folder's checkpoints and start anew.")] = False,
    world: Annotated[int | None, typer.Option(min=1, help="With --plan: plan for so many GPUs.")] = None,
    gpu_gib: Annotated[
        float | None,
        typer.Option(
            min=1, help="With --plan: memory of a GPU; else this machine's GPU's, and with --world 80 where it has none."
        ),
    ] = None,
    gpus_per_host: Annotated[int, typer.Option(min=1, help="With --world: GPUs that fast links join.")] = 8,
    tflops: Annotated[float, typer.Option(min=1, help="With --world: what its products reach, not its rating.")] = 540.0,
    link: Annotated[float, typer.Option(min=0.1, help="With --world: GB/s of one GPU's link within its host.")] = 360.0,
    host_link: Annotated[float, typer.Option(min=0.1, help="With --world: GB/s for each GPU between hosts.")] = 45.0,
) -> None:
    """Train a draft; alone, or under torchrun. Goes on from the run folder's newest checkpoint."""
    from fastdraft.config import load_config
    from fastdraft.dist import mesh
    from fastdraft.dist.fleet import Hardware
    from fastdraft.run.plan import planned_gpu_gib, print_fleet_plan, print_plan
    from fastdraft.train import train as run

    if not plan:
        refuse_idle(context, ("world", "gpu_gib"), "--plan")
    if world is None:
        refuse_idle(context, ("gpus_per_host", "tflops", "link", "host_link"), "--world")
    loaded = load_config(config, overrides or [])
    if plan:
        if mesh.rank() != 0:
            return
        if world is None:
            print_plan(loaded, console, gpu_gib, fresh)
        else:
            if gpu_gib is None:
                gpu_gib, why = planned_gpu_gib()
                say(why)
            print_fleet_plan(loaded, world, Hardware(gpu_gib, tflops, gpus_per_host, link, host_link), console)
        return
    result = run(loaded, fresh)
    mesh.end_process()
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)


@app.command()
def init(
    target: Annotated[str, typer.Argument(help="Target: a local directory with its config.json.")],
    out: Annotated[Path | None, typer.Argument(help="File to write; standard output when left out.")] = None,
    method: Annotated[
        str, typer.Option(help="The draft's method, draft.method of a config: eagle3, dflash, dflash2 or dspark.")
    ] = "eagle3",
) -> None:
    """Write a draft config derived from a target, to edit and name as draft.config."""
    from fastdraft.files import write_file
    from fastdraft.model.methods import named_method

    text = named_method(method).shape.init_config(target)
    if out is None:
        sys.stdout.write(text)
    elif out.exists():
        raise ValueError(f"{out} exists; name another file, or delete it first")
    else:
        write_file(out, text.encode())


@data.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    report: Annotated[Path | None, typer.Option(help="Folder: also draw data.png there.")] = None,
) -> None:
    """Tokenise the data of a config into the cache, and say what came of it."""
    from fastdraft.config import load_config
    from fastdraft.data.statistics import statistics
    from fastdraft.run.draft import draft_shape
    from fastdraft.run.inputs import load_data, trained_and_held_out

    loaded = load_config(config, overrides or [])
    if report is not None and report.exists() and not report.is_dir():  # before the data are read, not after
        raise ValueError(f"--report {report} is a file; name a folder, in which data.png is to be drawn")
    shape = draft_shape(loaded)
    prepared = load_data(loaded, shape)
    numbers = statistics(prepared.train, shape.vocab_size, loaded.data.pack_tokens)
    for line in [*prepared.lines(), *trained_and_held_out(loaded, prepared), *numbers.lines(shape.draft_vocab_size)]:
        say(line)
    if report is not None:
        from fastdraft.data.picture import write_data_report

        say(str(write_data_report(report, numbers, shape.draft_vocab_size)))


@data.command("preview")
def preview_command(
    config: ConfigFile,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Conversations to show.")] = 3,
) -> None:
    """Show the first conversations as the draft will see them, trained tokens coloured."""
    from fastdraft.config import load_config
    from fastdraft.data.prepare import Stats, chat_tokenizer, date_lines, first_samples
    from fastdraft.data.preview import preview
    from fastdraft.run.draft import draft_shape
    from fastdraft.target.hf import load_tokenizer
    from fastdraft.target.identity import stop_ids

    loaded = load_config(config, overrides or [])
    target = loaded.target.path, loaded.target.trust_remote_code
    tokenizer, stats = load_tokenizer(*target), Stats()
    chat = chat_tokenizer(loaded.data, tokenizer, draft_shape(loaded).vocab_size, stop_ids(*target))
    preview(first_samples(loaded.data, chat, stats), tokenizer, n, console, stats)
    for line in date_lines(chat.template_date):
        say(line)


@data.command()
def regenerate(
    context: typer.Context,
    prompts: Annotated[
        list[str], typer.Argument(help="JSONL or Parquet of prompt, messages or conversations; glob patterns allowed.")
    ],
    out: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="File to write, readable as data.paths.")],
    url: Annotated[
        list[str] | None, typer.Option(help="OpenAI-compatible server, http://host:port/v1; repeatable.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Instead of servers: a target to load here.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name, where the servers serve several.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Default: the model's own.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For each answer, reasoning included.")] = 2048,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.")] = None,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help='More for a request: {"chat_template_kwargs": {...}}')
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time, for each server.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="Of one request, waiting 1, 2, 4 ... 60 s.")] = 6,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    batch_size: Annotated[int, typer.Option(min=1, help="With --target: conversations at a time.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="With --target: bf16, fp32, or auto: bf16, but fp32 on a CPU that is slower in bf16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="With --target: auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="With --target.")] = False,
    template_date: Annotated[
        str | None, typer.Option(help="With --target: today, to a chat template that writes it; as data.template_date.")
    ] = None,
    allow_failures: Annotated[bool, typer.Option("--allow-failures", help="Write OUT without what failed.")] = False,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines", help="Leave out lines that are no prompt.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left at OUT.")] = False,
    store: Annotated[
        Path | None,
        typer.Option("--capture", metavar="STORE", help="With --config: also keep the features, from `serve-target`."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="With --capture: the run that will read OUT and STORE.")
    ] = None,
) -> None:
    """Let the target answer prompts. Stopped or killed, the same command goes on."""
    from fastdraft.answers.job import Sampling
    from fastdraft.answers.regenerate import regenerate
    from fastdraft.answers.server import Servers, parse_extra_body

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed, parse_extra_body(extra_body))
    if bool(url) == bool(target):
        raise ValueError("give either --url (repeatable) or --target: who is to answer?")
    if (store is None) != (config is None):
        raise ValueError("--capture STORE and --config RUN.yaml go together: the run says what of the answers is trained")
    if store is not None:
        if not url:
            raise ValueError("--capture takes the states from servers of `serve-target`: give them with --url")
        refuse_idle(context, ("batch_size", "dtype", "device", "trust_remote_code", "template_date"), "--target")
        from fastdraft.config import load_config
        from fastdraft.dist.mesh import end_process
        from fastdraft.run.answers import capture_answers

        server = {"model": model, "api_key": os.environ.get(api_key_env), "concurrency": concurrency}
        server |= {"timeout_s": timeout, "retries": retries}
        job = {"allow_failures": allow_failures, "skip_bad_lines": skip_bad_lines, "fresh": fresh}
        loaded = load_config(config, [f"target.url={json.dumps(url)}"])
        outcome = capture_answers(loaded, prompts, out, store, sampling, console, say, server, job)
        end_process()
    elif url:
        refuse_idle(context, ("batch_size", "dtype", "device", "trust_remote_code", "template_date"), "--target")
        by = Servers(url, model, sampling, os.environ.get(api_key_env), concurrency, timeout, retries)
    else:
        refuse_idle(context, ("model", "concurrency", "timeout", "retries", "api_key_env"), "--url")
        from fastdraft.answers.file import recorded_settings
        from fastdraft.answers.local import name_dtype, open_local
        from fastdraft.data.config import TEMPLATE_DATE
        from fastdraft.dist.mesh import start_process

        place, date = start_process(device), template_date or TEMPLATE_DATE
        dtype, lines = name_dtype(dtype, place, {} if fresh else recorded_settings(out))
        for line in lines:
            say(line)
        by = open_local(target, place, dtype, batch_size, trust_remote_code, sampling, date)
    if store is None:
        outcome = regenerate(prompts, out, by, console, allow_failures, skip_bad_lines, fresh)
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    if not outcome.complete:
        raise typer.Exit(1)


def _auto_or_fp8(dtype: str) -> str:
    if dtype not in ("auto", "fp8"):
        raise ValueError(f"--dtype {dtype} is not one of auto, fp8")
    return dtype


StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a feature store.")]


@features.command()
def capture(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="STORE", help="Folder to fill; may be partly filled.")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say how large it will be; capture nothing.")] = False,
    dtype: Annotated[str, typer.Option(help="auto: as the target runs; fp8: half of bf16.")] = "auto",
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Only every N-th shard from the I-th (0 ..); `merge` the parts.")
    ] = "0/1",
    url: Annotated[
        list[str] | None, typer.Option(help="As target.url: servers of `serve-target` that run the target; repeatable.")
    ] = None,
) -> None:
    """Run the target over a config's documents and keep their features; alone, under torchrun, or many at once."""
    from fastdraft.config import load_config
    from fastdraft.dist import mesh
    from fastdraft.run.features import capture_features

    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError(f"--part {part} is not I/N with 0 <= I < N")
    servers = [f"target.url={json.dumps(url)}"] if url else []
    loaded = load_config(config, [*(overrides or []), *servers])
    capture_features(loaded, out, _auto_or_fp8(dtype), (int(i), int(n)), plan, say)
    mesh.end_process()


@features.command("import-specforge")
def import_specforge_command(
    config: ConfigFile,
    dumps: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of SpecForge's prepare_hidden_states.")],
    out: Annotated[Path, typer.Argument(metavar="STORE", help="Folder to fill; may be partly filled.")],
    overrides: Overrides = None,
    dtype: Annotated[str, typer.Option(help="auto: target.dtype; fp8: half of bf16.")] = "auto",
) -> None:
    """Put existing SpecForge features into a store, checked against the config's target."""
    from fastdraft.config import load_config
    from fastdraft.run.features import import_specforge

    import_specforge(load_config(config, overrides or []), dumps, out, _auto_or_fp8(dtype), say)


@features.command("inspect")
def inspect_store(store: StoreFolder) -> None:
    """Say whose features a store holds, and how many."""
    from fastdraft.features.store import inspect_lines

    for line in inspect_lines(store):
        say(line)


@features.command("verify")
def verify_features(store: StoreFolder) -> None:
    """Read all of a store and name what is damaged; exit code 1 if anything is."""
    from fastdraft.features.store import verify_store

    bad = total = 0
    for _, wrong in verify_store(store):
        total += 1
        if wrong is not None:
            bad += 1
            say(wrong)
    say(f"{store}: {total - bad} of {total} files are sound")
    if bad:
        raise typer.Exit(1)


@features.command("merge")
def merge_features(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores of the same target.")],
) -> None:
    """Put the parts of one capture together, or stores of different data one after another."""
    from fastdraft.features.store import merge_stores

    found = merge_stores(out, stores, say)
    say(f"{out}: {found.documents:,} documents in {found.shards} shards")


@app.command("serve-target", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_target(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A local directory or hub name.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers that the draft reads, from 0: 1,15,28. Default: those of an EAGLE-3 draft.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Where states are handed over; default: in /dev/shm, by user and port.")
    ] = None,
    states_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Also hand states over on this port, to trainers on other hosts you trust."),
    ] = None,
    engine_python: Annotated[Path | None, typer.Option(help="The Python that has vLLM; else this one.")] = None,
    engine_pythonpath: Annotated[str | None, typer.Option(help="PYTHONPATH for it.")] = None,
    show: Annotated[bool, typer.Option("--print", help="Print vLLM's command; start nothing.")] = False,
) -> None:
    """Start an unmodified vLLM that gives features to `train` and `features capture` (target.url). Everything else on the
    command line is vLLM's: --port, --tensor-parallel-size, --gpu-memory-utilization, --max-model-len ..."""
    from fastdraft.serving.engines import EnginePlace, engine_version
    from fastdraft.target.served.connector.fastdraft_handover import open_folder
    from fastdraft.target.served.server import parse_layers, refuse_other_version, serve_command

    place = EnginePlace("vllm", str(engine_python or sys.executable), engine_pythonpath)
    refuse_other_version(engine_version(place))
    command = serve_command(
        place.python, target, context.args, parse_layers(layers), folder, engine_pythonpath, states_port
    )
    if show:
        say(shlex.join(["env", *(f"{name}={value}" for name, value in command.environment.items()), *command.arguments]))
        return
    open_folder(command.folder)
    say(f"target.url: {command.url} once vLLM has started; states of the layers {list(command.layers)} in {command.folder}")
    sys.stdout.flush()
    os.execvpe(command.arguments[0], command.arguments, os.environ | command.environment)


@app.command()
def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts: also decode speculatively and measure.")] = None,
    which: Annotated[str, typer.Option(help="Checkpoint: best, last or a step.")] = "best",
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts to decode.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    num_steps: Annotated[
        int | None,
        typer.Option(
            help="Draft steps, as SGLang's speculative_num_steps; 3, or the whole block of a draft that has blocks."
        ),
    ] = None,
    eagle_topk: Annotated[int, typer.Option(help="1: a chain; more: a tree.")] = 1,
    num_draft_tokens: Annotated[int | None, typer.Option(help="Tokens verified at once, root included.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    verify: Annotated[
        str,
        typer.Option(
            help="How a chain drawn at temperature > 0 is checked: token by token, or as a whole block, which keeps "
            "more; vLLM's rejection_sample_method block, SGLang's speculative_use_block_verification."
        ),
    ] = "token",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts decoded at once; 1 gives the speed of a sequence alone.")
    ] = 64,
    url: Annotated[
        list[str] | None, typer.Option(help="Of a run with target.url: servers that run its target now; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
) -> None:
    """Simulated acceptance on the run's held-out data, and with --prompts real speculative decoding; alone, or under
    torchrun where one GPU cannot hold the target."""
    from fastdraft.dist import mesh
    from fastdraft.files import write_file
    from fastdraft.model.proposal import DecodeSettings
    from fastdraft.run.finished import evaluate_run

    if prompts is None:
        decoding = ("max_prompts", "max_new_tokens", "num_steps", "eagle_topk", "num_draft_tokens", "temperature", "verify")
        refuse_idle(context, (*decoding, "batch_size"), "--prompts")
    if num_steps is None and num_draft_tokens is not None:
        num_steps = DecodeSettings().num_steps
    steps = DecodeSettings().num_steps if num_steps is None else num_steps
    settings = DecodeSettings(steps, eagle_topk, num_draft_tokens, temperature, verify=verify)
    if out is not None:  # before hours of work, not after
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise ValueError(f"{out} is a folder, or in one that cannot be written; name another file with --out")
    whole = num_steps is None
    report = evaluate_run(
        run, which, prompts, max_prompts, max_new_tokens, settings, say_aside, url or (), whole, batch_size
    )
    if mesh.is_rank_0():
        text = json.dumps(asdict(report), indent=1)
        console.print_json(text)
        if out is not None:
            write_file(out, text.encode())
    mesh.end_process()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    which: Annotated[str, typer.Option(help="Checkpoint: best, last or a step.")] = "best",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint that SGLang and vLLM load unmodified, and verify it; alone, or under torchrun where one GPU cannot
    hold the target."""
    from fastdraft.dist import mesh
    from fastdraft.run.finished import export_run

    for line in export_run(run, out, which, overwrite):
        say(line)
    mesh.end_process()


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="A running SGLang or vLLM server with the draft.")],
    prompts: Annotated[list[Path], typer.Option(help="JSONL with `prompt` or `messages`; may be repeated.")],
    baseline_url: Annotated[str | None, typer.Option(help="The same target without a draft, measured beside it.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Or the serve.json of an earlier run without a draft.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in flight: a number, or several with commas.")] = "1",
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Of each file, the first so many.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    body: Annotated[str, typer.Option(help="Further fields of every request, a JSON object.")] = "{}",
    warmup: Annotated[int, typer.Option(help="Requests to each server before measuring.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 300.0,
    retries: Annotated[int, typer.Option(help="Times a request that failed is sent again.")] = 2,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    out: Annotated[Path | None, typer.Option(help="Directory for serve.json.")] = None,
) -> None:
    """Accepted length, acceptance by depth, speed and latency in a running server."""
    from fastdraft.data.prompts import read_prompts
    from fastdraft.files import write_file
    from fastdraft.serving.load import ServeReport, bench_serve, parse_load, read_report, render_serve

    load = parse_load(
        concurrency,
        body,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_warmup=warmup,
        timeout_s=timeout,
        retries=retries,
    )
    sets = {file.stem: read_prompts(file)[:max_prompts] for file in prompts}
    if len(sets) < len(prompts):
        raise ValueError(f"two prompt files have one name: {', '.join(map(str, prompts))}; a file's name names its set")

    def keep(report: ServeReport) -> None:
        cell = report.cells[-1]
        say(f"{cell.prompts}, {cell.concurrency} in flight: {cell.measured.output_tokens_per_s:,.1f} tokens/s")
        if out is not None:  # after each cell: a server that dies costs the rest only
            write_file(out / "serve.json", (json.dumps(asdict(report), indent=1) + "\n").encode())

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    earlier = read_report(baseline) if baseline is not None else None
    report = bench_serve(url, sets, load, baseline_url, earlier, os.environ.get(api_key_env), keep)
    render_serve(report, console)
    if out is not None:
        say(f"wrote {out / 'serve.json'}")


@app.command()
def check(
    context: typer.Context,
    checkpoint: Annotated[Path | None, typer.Option(help="Serving checkpoint to verify.")] = None,
    target: Annotated[Path | None, typer.Option(help="Its target's directory.")] = None,
    golden: Annotated[Path | None, typer.Option(help="Folder of golden cases to run.")] = None,
    step: Annotated[str, typer.Option(help="With --golden: reference or fused.")] = "reference",
    engine: Annotated[str | None, typer.Option(help="With --checkpoint: vllm or sglang, to serve it there.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="With vllm or sglang: JSONL of prompts to serve.")] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="Of them, at most this many.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 64,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="Tokens drafted at a time; 3, or the whole block of a draft that has blocks.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="What the engine runs in; the target's own dtype if left out.")] = None,
    engine_python: Annotated[Path | None, typer.Option(help="The Python that has the engine; else this one.")] = None,
    engine_pythonpath: Annotated[str | None, typer.Option(help="PYTHONPATH for it.")] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that the engine may take, with and without the draft each.")
    ] = 1800,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the target's own code.")] = False,
    engine_alone: Annotated[
        bool, typer.Option("--engine-alone", help="With vllm or sglang: do not load the target here to compare with.")
    ] = False,
) -> None:
    """Verify a checkpoint, also in a real engine; run golden cases; or with no option say what this machine can do, and
    prove its kernels."""
    from fastdraft import check as checks
    from fastdraft.serving.engines import ENGINES, EnginePlace

    if target is not None and checkpoint is None:
        raise ValueError("--target belongs to --checkpoint; name the checkpoint to verify against it")
    serving = engine is not None
    if serving and engine not in ENGINES:
        of_golden = "" if golden is None else "; --golden takes --step reference or fused"
        raise ValueError(f"--engine {engine!r} is not one of {', '.join(ENGINES)}{of_golden}")
    if golden is None:
        refuse_idle(context, ("step",), "--golden")
    if not serving:
        lengths = ("prompts", "max_prompts", "max_new_tokens", "num_steps")
        engines = ("dtype", "engine_python", "engine_pythonpath", "timeout", "trust_remote_code", "engine_alone")
        refuse_idle(context, lengths + engines, f"--engine {' or '.join(ENGINES)}")
    if serving and checkpoint is None:
        raise ValueError(f"--engine {engine} needs --checkpoint and --target, the draft to serve and its target")
    good = True
    if checkpoint is not None:
        from fastdraft.serving.export import told_target, verify

        if target is None:
            raise ValueError("--checkpoint needs --target, the directory of the model it drafts for")
        findings = verify(checkpoint, target)
        for line in findings.warnings:
            say("warning: " + line)
        for line in findings.errors:
            say("error: " + line)
        good = not findings.errors
        count = "1 error" if len(findings.errors) == 1 else f"{len(findings.errors)} errors"
        say(f"{checkpoint}: " + ("verified for SGLang and vLLM" if good else count))
        for line in told_target(checkpoint, target).notes if good else ():
            say(line)
        if serving:
            from fastdraft.serving.check import check_engine

            place = EnginePlace(engine, str(engine_python or sys.executable), engine_pythonpath)
            lengths = (max_prompts, max_new_tokens, num_steps)
            report = check_engine(
                place, checkpoint, target, prompts, *lengths, dtype, timeout, trust_remote_code, engine_alone
            )
            for line in report.lines():
                say(line)
            good &= not report.errors
    if golden is not None:
        good &= show_errors("case", checks.check_golden(golden, step))
    if checkpoint is None and golden is None:
        table = Table("", "", show_header=False)
        for row in checks.environment():
            table.add_row(*row)
        console.print(table)
        if checks.kernels() == "can run":
            say("the kernels on this GPU: a bf16 fused step against the reference in float64")
            good &= show_errors("draft", checks.prove_kernels("cuda"))
    if not good:
        raise typer.Exit(1)


def show_errors(what: str, rows: list[tuple[str, str, float, float]]) -> bool:
    """Prints what was compared, quantity, error and what is allowed; True when all errors are allowed."""
    table = Table(what, "quantity", "worst relative error", "allowed", "")
    for name, quantity, error, allowed in rows:
        table.add_row(name, quantity, f"{error:.1e}", f"{allowed:.0e}", "ok" if error <= allowed else "WRONG")
    console.print(table)
    return all(error <= allowed for _, _, error, allowed in rows)


def main() -> None:
    warnings.showwarning = _show_warning
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code in (None, 0) and _is_one_of_several():
            atexit._run_exitfuncs()
            _end(0)
        raise
    except StoppedEarly as stopped:
        _say_why(f"{stopped}; the same command, given again, goes on")
        _end(128 + stopped.number)
    except Exception as error:
        said = _one_line(error)
        if said is not None:
            _say_why(said)
        elif _is_one_of_several():
            sys.excepthook(*sys.exc_info())
        else:
            raise
        _end(1)


def _end(code: int) -> NoReturn:
    """One process of several does not leave it to Python's own end. Where others have failed, too, that may wait for ever:
    it frees what a GPU uses, and that GPU waits for a process that is gone. And where all went well, a thread of
    torch.distributed's may still end it with SIGABRT, about once in ten times over gloo."""
    if _is_one_of_several():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe that nobody reads any more, a full disk
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    if "torch" not in sys.modules:  # importing it takes seconds, and who has not yet meets nobody
        return False
    from fastdraft.dist.mesh import world

    return world() > 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Of ours a line without the place in the code; of the libraries what Python would print."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        say_aside(f"warning: {message}")
    else:
        _SHOW_WARNING(message, category, filename, lineno, file, line)


def _say_why(said: str) -> None:
    from fastdraft.dist.mesh import speaker

    Console(stderr=True).print(f"{speaker()}: {said}", style="red", markup=False, highlight=False, soft_wrap=True)


def _one_line(error: Exception) -> str | None:
    """What to tell the user; None for a fault of ours, whose traceback is wanted."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    import torch
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError):
        return "a config.json cannot be used: " + " ".join(str(error).split())
    from fastdraft.dist.mesh import host_size, is_lost_peer, world
    from fastdraft.dist.watch import LostPeer

    if isinstance(error, LostPeer):
        return str(error)
    if is_lost_peer(error):
        lost = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        hint = "" if world() == host_size() else "; hosts that never meet need GLOO_SOCKET_IFNAME, see docs/fleet.md"
        return (
            f"another process of this run has ended, or cannot be reached ({lost}); the same command, given again, goes on"
            f"{hint}"
        )
    cpu_full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or cpu_full:
        return (
            f"out of memory: {str(error).strip()}\nTo need less, lower data.pack_tokens (with data.max_length), "
            "chunk_rows, ttt_length or draft_vocab_size; `fastdraft train CONFIG.yaml --plan` predicts the memory"
        )
    return None


if __name__ == "__main__":
    main()
