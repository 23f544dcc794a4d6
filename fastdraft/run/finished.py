"""A run that was trained, read from its folder: its draft, its evaluation, its export."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn

from fastdraft import checkpoint
from fastdraft.batch import Batch, Rows
from fastdraft.config import Config, FeaturesConfig, without_removed
from fastdraft.data.loader import eval_batches
from fastdraft.data.prepare import read_template
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import BATCH_SIZE, refuse_undecodable
from fastdraft.dist import mesh
from fastdraft.evaluate import DecodeReport, TauReport, evaluate_decode, evaluate_tau
from fastdraft.model.methods import method_of, named_method
from fastdraft.model.precision import bf16_is_slow, dtype_name, speed
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.target_config import read_target_config
from fastdraft.run.draft import make_step
from fastdraft.run.dtypes import compute_dtype, name_dtypes, saved_dtypes, target_dtype
from fastdraft.run.inputs import choose_holders, documents_hash, load_data, open_source, open_target
from fastdraft.run.plan import own_dtype
from fastdraft.serving.export import export_draft, verify
from fastdraft.target.hf import Target, load_tokenizer
from fastdraft.target.identity import local_folder, origin, target_fingerprint
from fastdraft.target.served.ends import FILES, load_ends
from fastdraft.target.source import InProcess, Source


def open_run(run_dir: Path, which: str = "best") -> tuple[Config, Target, nn.Module]:
    """A run's config, its target, and its draft from checkpoint `which` (best, last or a step), ready to decode.

    A target that was run in bf16 has the same weights here. On a CPU where bf16 is slow they are computed with in fp32.
    ValueError when servers ran the target: then it may not fit here, or be another in its last bits.
    """
    return _open(*read_draft(run_dir, which))


def _open(saved: checkpoint.Saved, draft: nn.Module) -> tuple[Config, Target, nn.Module]:
    if was_served(saved):
        raise ValueError(f"{saved.path} was trained on what servers gave, and their target is not loaded into this process")
    config, device = config_here(saved)
    holders, _ = choose_holders(config, device)
    run_in = torch.float32 if bf16_is_slow(device) else None
    target = open_target(config, draft.config.layers, device, holders, run_in=run_in)
    refuse_other_target(saved, target_fingerprint(target), config)
    draft.take_from_target(target.embedding)
    return config, target, draft.to(device)


@contextmanager
def read_together(config: Config) -> Iterator[None]:
    """The processes that read a run together; what ends one ends all of them."""
    mesh.start_process(config.device, config.dist.timeout_s)
    with mesh.ending_together(config.dist.silent_s, "give the same command again"):
        yield
        mesh.begin(None)


def was_served(saved: checkpoint.Saved) -> bool:
    """Whether servers ran the target of a checkpoint's features, those of a store included."""
    return saved.state["target"].startswith(FILES)


def saved_config(saved: checkpoint.Saved) -> Config:
    """A checkpoint's settings. Those that are new since it was written have their defaults."""
    return Config.model_validate(without_removed(saved.state["config"]))


def config_here(saved: checkpoint.Saved) -> tuple[Config, torch.device]:
    """`saved_config` with the dtypes that the run was begun in, and this process's device."""
    config = saved_config(saved)
    device = mesh.start_process(config.device, config.dist.timeout_s)
    return name_dtypes(config, device, begun=saved_dtypes(saved.state["config"], device))[0], device


def read_draft(run_dir: Path, which: str) -> tuple[checkpoint.Saved, nn.Module]:
    """The draft of a run's checkpoint; where best or last is damaged, of the newest one that is not, with a warning."""
    paths = checkpoint.checkpoints_of_run(run_dir, which)
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        try:
            saved = checkpoint.read_state(path)
            method = named_method(saved_config(saved).draft.method)
            draft = method.draft(method.shape.model_validate(saved.state["draft"]))
            parameters = list(draft.trainable().values())
            sizes = [p.numel() for p in parameters]
            tensors = {"master": torch.empty(sum(sizes))} | draft.frozen()
            checkpoint.load_tensors(saved, tensors)
        except checkpoint.Unreadable as error:
            if following is None:
                raise
            warnings.warn(f"{error}; {following.name} is used instead", stacklevel=1)
            continue
        for p, values in zip(parameters, tensors["master"].split(sizes), strict=True):
            p.data.copy_(values.view_as(p))
        return saved, draft
    raise AssertionError("a run has a checkpoint or checkpoints_of_run raises")


@dataclass(frozen=True)
class Evaluation:
    """`held_out` is None when the run has no held-out data, `decode` when no prompts were given."""

    checkpoint: str
    held_out: TauReport | None
    decode: DecodeReport | None


def evaluate_run(
    run_dir: Path,
    which: str,
    prompts: Path | None,
    max_prompts: int,
    max_new_tokens: int,
    settings: DecodeSettings,
    say: Callable[[str], None] = lambda line: None,
    urls: Sequence[str] = (),  # servers of the target, where they are others than the run's
    own_steps: bool = False,  # draft as many steps as the draft's method serves, and not settings.num_steps
    batch_size: int = BATCH_SIZE,  # prompts decoded at once
) -> Evaluation:
    """Simulated acceptance on the run's held-out data, and real speculative decoding of `prompts` (JSONL) if given.

    `say` is told why prompts are decoded one at a time, where the target cannot decode several together.

    Target and draft are computed in the run's dtypes. On a CPU where bf16 is slow their bf16 weights are computed with in
    fp32, and `say` is told. Where servers ran the target, they or the run's store give the held-out features, and
    decoding is the engine's: ValueError for `prompts`.
    """
    saved, draft = read_draft(run_dir, which)
    if was_served(saved):
        if prompts is not None:
            raise ValueError(
                f"{run_dir} was trained on what servers gave, and their target is not loaded into this process to decode "
                "with; export the draft and let the engine decode: `fastdraft check --checkpoint OUT --target DIR --engine "
                "vllm --engine-alone --prompts FILE`, or `fastdraft bench serve` against a server that has the draft"
            )
        return Evaluation(_named(saved, run_dir, which), evaluate_served(saved, draft, say, urls), None)
    if urls:
        raise ValueError(f"--url names servers of the target, and {run_dir} was trained with its target in the process")
    with read_together(saved_config(saved)):
        config, target, draft = _open(saved, draft)
        if own_steps:
            settings = replace(settings, num_steps=method_of(draft).served_steps(draft.config, None))
        dtypes = target_dtype(config, target.device), compute_dtype(config, target.device)
        draft.to(dtypes[1])
        if torch.bfloat16 in dtypes:
            config = _in_fp32_where_bf16_is_slow(config, draft, target.device, say)
        ids = None
        if prompts is not None:  # read before anything long: they may be bad
            tokenizer = load_tokenizer(*config.target.files)
            tokenizer.chat_template = read_template(config.data) or tokenizer.chat_template
            asked, kwargs = read_prompts(prompts)[:max_prompts], config.data.chat_template_kwargs
            ids = prompt_ids(asked, tokenizer, config.data.template_date, **kwargs)
            refuse_undecodable(target, draft, ids, max_new_tokens, settings, batch_size)
        data = load_data(config, draft.config)
        held_out = decoded = None
        if len(data.eval):
            _say_other_documents(saved, data.eval, say)
            held_out = evaluate_held_out(config, InProcess(target), draft, data.eval)
        elif prompts is None:
            raise ValueError(
                f"{run_dir} has no held-out data: {data.none_held_out}, and train anew; or give --prompts, which needs none"
            )
        if ids is not None:
            # One forward may read many prompts, and is only sometimes the first.
            timed = target.decoder.register_forward_pre_hook(lambda *_: mesh.begin("decoding prompts", config.dist.disk_s))
            decoded = evaluate_decode(target, draft, ids, settings, max_new_tokens, None, batch_size)
            timed.remove()
            if decoded is not None and decoded.one_at_a_time is not None:
                say(f"prompts were decoded one at a time: {decoded.one_at_a_time}")
        return Evaluation(_named(saved, run_dir, which), held_out, decoded)


def _named(saved: checkpoint.Saved, run_dir: Path, which: str) -> str:
    """The checkpoint that was read: with no best one, or a damaged one, it is another than was asked for."""
    return f"{run_dir} ({which}: step {saved.step})" if not which.isdigit() else f"{run_dir} (step {saved.step})"


def _say_other_documents(saved: checkpoint.Saved, held_out: Dataset, say: Callable[[str], None]) -> None:
    then = saved.state.get("held_out")  # a checkpoint of before 2026-11-28 has none
    if then is not None and then != documents_hash(held_out):
        say(
            "warning: the held-out documents are others than while it was trained, since data or their reading changed: "
            "these numbers are not to be compared with the run's own"
        )


def _in_fp32_where_bf16_is_slow(
    config: Config, draft: nn.Module, device: torch.device, say: Callable[[str], None]
) -> Config:
    """Where bf16 is slow on this CPU, a draft of bf16 weights computes with them in fp32, which is said."""
    if not bf16_is_slow(device):
        return config
    say(f"the run's bf16 weights are computed with in fp32 on this machine, {speed(device)}")
    draft.float()
    return config.model_copy(update={"precision": "fp32"})


def evaluate_held_out(config: Config, source: Source, draft: nn.Module, eval_set: Dataset) -> TauReport:
    """Simulated acceptance on the run's held-out data, by a draft in the run's compute dtype. Processes share the packs."""
    rank, world = mesh.rank(), mesh.world()
    mine = len(range(rank, config.eval.max_packs, world))
    batches = list(itertools.islice(eval_batches(eval_set, config.data.pack_tokens, rank, world), mine))
    step = make_step(config, draft, source.ends)
    source.expect(batches)

    def step_rows(batch: Batch) -> Rows:
        mesh.begin("evaluating a pack", config.dist.stuck_s)
        return step.rows(*source.capture(batch))

    def reduce(sums: Tensor) -> Tensor:
        source.meet()
        return mesh.axis("replicas").sum_(sums)

    weights = method_of(draft).step_weights(config, draft.config)
    return evaluate_tau(step_rows, batches, len(weights.weight), reduce=reduce)


def evaluate_served(
    saved: checkpoint.Saved, draft: nn.Module, say: Callable[[str], None], urls: Sequence[str] = ()
) -> TauReport:
    """`evaluate_held_out` of a run whose target servers run: features come from them, or from the run's store."""
    config, device = config_here(saved)
    if urls:
        target = config.target.model_copy(update={"url": list(urls)})
        config = config.model_copy(update={"target": target, "features": FeaturesConfig()})
    draft.to(device, compute_dtype(config, device))
    if compute_dtype(config, device) == torch.bfloat16:
        config = _in_fp32_where_bf16_is_slow(config, draft, device, say)
    data = load_data(config, draft.config)
    if not len(data.eval):
        raise ValueError(f"{saved.path} is of a run without held-out data: {data.none_held_out}, and train anew")
    _say_other_documents(saved, data.eval, say)
    source = open_source(config, draft.config.layers, device, [data.eval])
    try:
        for line in source.notes:
            say(line)
        refuse_other_target(saved, source.ends.fingerprint, config)
        draft.take_from_target(source.ends.embedding)
        return evaluate_held_out(config, source, draft, data.eval)
    finally:
        source.close()


def refuse_other_target(saved: checkpoint.Saved, fingerprint: str, config: Config) -> None:
    if fingerprint != saved.state["target"]:
        raise ValueError(f"checkpoint {saved.path} was trained for another target than {config.target.path} now holds")


def export_run(run_dir: Path, out: Path, which: str, overwrite: bool) -> list[str]:
    """Writes the run's draft in serving format in the target's dtype, verifies it, and says what was done.

    The dtype is the one that the target's config.json names, whatever training ran the target in. ValueError: `out` exists
    and `overwrite` was not asked for, which is said before a target is loaded.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another directory, or replace it with --overwrite")
    saved, draft = read_draft(run_dir, which)
    with read_together(saved_config(saved)):
        if was_served(saved):
            config, device = config_here(saved)
            target = load_ends(
                config.target.path, target_dtype(config, device), device, config.target.trust_remote_code
            ).ends
            refuse_other_target(saved, target.fingerprint, config)
            draft.take_from_target(target.embedding)
        else:
            config, target, draft = _open(saved, draft)
        if not mesh.is_rank_0():  # it holds a part of the target, of which the draft takes what every process has
            return []
        target_dir = local_folder(config.target.path)
        dtype = own_dtype(read_target_config(target_dir)) or target.dtype
        try:
            told, trained_for = [], origin(config.target.path)
        except ValueError as error:
            told, trained_for = [f"{out} does not say which target it was trained for: {error}"], None
        export_draft(draft, out, dtype, overwrite, trained_for)
        findings = verify(out, target_dir)
        if findings.errors:
            raise ValueError(f"{out} was written but does not verify: " + " ".join(findings.errors))
        return [
            *findings.warnings,
            *told,
            f"{out}: {_named(saved, run_dir, which)}, {dtype_name(dtype)}; verified for SGLang and vLLM",
        ]
