"""SpecForge's dumps become a store that trains as an own capture does; what is not right about them is named."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import losses
from tiny import save_target

from fastdraft.batch import Batch
from fastdraft.data.loader import Loader
from fastdraft.data.vocab import read_vocab_mapping
from fastdraft.features.store import list_shards
from fastdraft.run.draft import draft_shape
from fastdraft.run.features import import_specforge
from fastdraft.run.finished import open_run
from fastdraft.run.inputs import load_data
from fastdraft.target.hf import Target, load_target
from fastdraft.target.specforge import DOCUMENTS
from fastdraft.train import train

PAD = 2


def dump(path: Path, target: Target, ids: torch.Tensor, mask: torch.Tensor, width: int, **changes) -> None:
    """As SpecForge writes a document: padded on the right, the states of the padding with it."""
    n = len(ids)
    padded = torch.cat([ids, torch.full((width - n,), PAD)])
    features = target.capture(Batch(padded, torch.zeros(width, dtype=torch.bool), (width,)))
    found = {
        "input_ids": padded,
        "loss_mask": torch.cat([mask.long(), torch.zeros(width - n, dtype=torch.int64)]),
        "aux_hidden_state": features.g[None],
        "hidden_state": features.f[None],
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        with gzip.open(path, "wb") as file:
            torch.save(found, file)
    else:
        torch.save(found, path)


@pytest.fixture
def target(target_dir) -> Target:
    return load_target(str(target_dir), torch.float32, "cpu")


@pytest.fixture
def dumps(make_config, target, tmp_path) -> Path:
    """Every document of the run in one file each, some compressed, and one in which nothing is trained."""
    config = make_config(**{"data.eval_fraction": 0})
    samples = load_data(config, draft_shape(config)).train
    documents = [d for rows in Loader(samples, 96, 1).packs for d in rows]
    table = samples.with_format("arrow")
    for i, row in enumerate(documents):
        ids, mask = (torch.tensor(table[[int(row)]][name][0].as_py()) for name in ("input_ids", "loss_mask"))
        where = tmp_path / "dumps" / f"rows_{i // 10 * 10}-{i // 10 * 10 + 10}" / f"data_{i}.ckpt{'.gz' * (i % 3 == 0)}"
        dump(where, target, ids, mask, 70)
    dump(where.with_name("data_900.ckpt"), target, torch.arange(5, 15), torch.zeros(10, dtype=torch.bool), 70)
    return tmp_path / "dumps"


def test_dumps_train_as_the_online_run_does(make_config, dumps, tmp_path):
    said = []
    out = tmp_path / "store"
    import_specforge(make_config(), dumps, out, say=said.append)
    assert "1 dumps without a trained token" in said[-1] and "of at least" in said[-1]
    config = make_config(
        run_dir=str(tmp_path / "offline"),
        **{"features.path": str(out), "data.paths": [str(out / DOCUMENTS)], "data.eval_fraction": 0},
    )
    train(config)
    online = config.features.model_copy(update={"path": None})
    train(config.model_copy(update={"features": online, "run_dir": str(tmp_path / "online")}))
    runs = [[r for r in losses(tmp_path / name) if "loss" in r] for name in ("offline", "online")]
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_import_goes_on(make_config, dumps, tmp_path, monkeypatch):
    out, whole = tmp_path / "store", tmp_path / "whole"
    import_specforge(make_config(), dumps, whole)
    damaged = dumps / "rows_10-20" / "data_13.ckpt"
    good = damaged.read_bytes()
    damaged.write_bytes(good[: len(good) // 2])
    monkeypatch.setattr("fastdraft.target.specforge.SHARD_BYTES", 1)
    with pytest.raises(ValueError, match=r"data_13.ckpt cannot be read"):
        import_specforge(make_config(), dumps, out)
    assert not (out / DOCUMENTS).exists()
    damaged.write_bytes(good)
    import_specforge(make_config(), dumps, out)
    assert (out / DOCUMENTS).read_bytes() == (whole / DOCUMENTS).read_bytes()
    assert len(list_shards(whole)) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_state": torch.zeros(1, 70, 31)}, r"the states are \(1, 70, 31\); 70 tokens .* \(1, 70, 32\)"),
        (
            {"aux_hidden_state": torch.zeros(1, 70, 96).half(), "hidden_state": torch.zeros(1, 70, 32)},
            "layer 1 by 1.00; .*norm",
        ),
        ({"loss_mask": torch.full((70,), 3)}, "loss_mask of 0 and 1"),
        ({"loss_mask": torch.ones(60)}, "equal length"),
        ({"aux_hidden_state": torch.full((1, 70, 96), torch.nan)}, "are not all finite"),
        ({"hidden_state": torch.zeros(1, 70, 32).double()}, "target.dtype is torch.float32"),
        ({"input_ids": torch.full((70,), 192)}, "whole numbers from 0 to 191"),
        ({"input_ids": torch.full((70,), -1)}, "whole numbers from 0 to 191"),
        ({"input_ids": torch.ones(70)}, "whole numbers from 0 to 191"),
        ({"input_ids": [1, 2], "hidden_state": None}, "input_ids is list; hidden_state is NoneType, not a tensor"),
    ],
)
def test_a_wrong_dump_is_named(make_config, target, tmp_path, changes, named):
    dump(tmp_path / "in" / "data_0.ckpt", target, torch.arange(20, 60), torch.ones(40, dtype=torch.bool), 70, **changes)
    with pytest.raises(ValueError, match=named):
        import_specforge(make_config(), tmp_path / "in", tmp_path / "out")


def test_dumps_of_another_target_or_before_the_norm_are_refused(make_config, tmp_path, target):
    other = load_target(str(save_target(tmp_path / "other", seed=9)), torch.float32, "cpu")
    ids, mask = torch.arange(20, 60), torch.ones(40, dtype=torch.bool)
    dump(tmp_path / "other" / "data_0.ckpt", other, ids, mask, 70)
    shifted = load_target(str(make_config().target.path), torch.float32, "cpu", (1, 3, 5))
    dump(tmp_path / "shifted" / "data_0.ckpt", shifted, ids, mask, 70)
    model, before = target.model.model, []
    handle = model.norm.register_forward_pre_hook(lambda module, x: before.append(x[0]))
    dump(tmp_path / "unused" / "data_0.ckpt", target, ids, mask, 70)
    handle.remove()
    dump(tmp_path / "before" / "data_0.ckpt", target, ids, mask, 70, hidden_state=before[0].detach().clone())
    for name, wrong in (
        ("other", "layer 1 by .*hidden_state"),
        ("shifted", "own: layer 4 by"),
        ("before", "own: hidden_state"),
    ):
        with pytest.raises(ValueError, match=wrong):
            import_specforge(make_config(), tmp_path / name, tmp_path / "out" / name)


def test_nothing_in_a_dump_runs(make_config, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "in").mkdir()
    torch.save({"input_ids": Evil()}, tmp_path / "in" / "data_0.ckpt")
    with pytest.raises(ValueError, match=r"data_0.ckpt cannot be read: damaged, or more than tensors") as said:
        import_specforge(make_config(), tmp_path / "in", tmp_path / "out")
    assert "trust" not in str(said.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"holds no data_<number>.ckpt"):
        import_specforge(make_config(), tmp_path / "out", tmp_path / "out2")


def test_a_vocabulary_map_is_taken_over(make_config, tmp_path):
    ids = torch.arange(64) * 3
    t2d = torch.zeros(192, dtype=torch.bool)
    t2d[ids] = True
    file = tmp_path / "vocab_mapping.pt"
    torch.save({"d2t": ids - torch.arange(64), "t2d": t2d}, file)
    assert torch.equal(read_vocab_mapping(file, 192), ids)
    config = make_config(max_steps=1, **{"draft.vocab_map": str(file)})
    train(config)
    draft = open_run(Path(config.run_dir), "last")[2]
    assert torch.equal(draft.draft_ids.cpu(), ids) and draft_shape(config).draft_vocab_size == 64
    for d2t, mask, named in (
        (ids, t2d, "do not name the same"),
        (ids - torch.arange(64), t2d[:-1], "is for a target of 191 tokens"),
        (ids.tolist(), t2d, "d2t is list, not a tensor"),
    ):
        torch.save({"d2t": d2t, "t2d": mask}, file)
        with pytest.raises(ValueError, match=named):
            read_vocab_mapping(file, 192)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"vocab_mapping.pt cannot be read: (?!.*mmap)"):
        read_vocab_mapping(file, 192)


@pytest.mark.skipif("SPECFORGE_DIR" not in os.environ, reason="SPECFORGE_DIR does not name a checkout of SpecForge")
def test_what_specforges_own_script_writes_trains(make_config, target_dir, chats, tmp_path):
    """Its script tokenises, masks, captures and writes (tests/specforge_dumps.py says what is not its own); the import
    compares the states with the target's own, and training on them gives what training online on its documents gives."""
    conversations = [{"conversations": json.loads(line)["messages"]} for line in chats.read_text().splitlines()]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    serving = draft_shape(make_config()).to_serving(torch.float32)
    (tmp_path / "draft.json").write_text(json.dumps(serving))
    options = {"target-model-path": target_dir, "data-path": tmp_path / "chats.jsonl", "output-path": tmp_path / "dumps"}
    options |= {"cache-dir": tmp_path / "cache", "draft-model-config": tmp_path / "draft.json", "chat-template": "qwen"}
    options |= {"max-length": 64, "batch-size": 4, "num-workers": 0, "build-dataset-num-proc": 1}
    command = [sys.executable, Path(__file__).parents[1] / "specforge_dumps.py", os.environ["SPECFORGE_DIR"]]
    command += [text for name, value in options.items() for text in (f"--{name}", value)]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "dumps").rglob("data_*.ckpt"))) == len(conversations)
    out = tmp_path / "store"
    import_specforge(make_config(), tmp_path / "dumps", out)
    assert len(read_vocab_mapping(tmp_path / "dumps" / "vocab_mapping" / "vocab_mapping.pt", 192)) == 64
    stored = {"features.path": str(out), "data.paths": [str(out / DOCUMENTS)], "data.eval_fraction": 0}
    config = make_config(run_dir=str(tmp_path / "offline"), **stored)
    train(config)
    online = config.features.model_copy(update={"path": None})
    train(config.model_copy(update={"features": online, "run_dir": str(tmp_path / "online")}))
    runs = [[r for r in losses(tmp_path / name) if "loss" in r] for name in ("offline", "online")]
    assert runs[0]
    for ours, online_row in zip(*runs, strict=True):
        assert ours == pytest.approx(online_row, rel=1e-4)
