"""Kernels compiled together: before the first launch, all of them, and once for every length."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.config import OptimConfig
from fastdraft.kernels import jit
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.optim import FlatAdamW

WITHOUT_A_GPU = """
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastdraft.kernels import swiglu
from fastdraft.kernels.jit import compile_together, jit, launch, tl

class H100:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    launcher_cls = lambda self, *_: lambda *_: launched.append(1)
    class utils:
        get_device_properties = lambda device: {"max_shared_mem": 232448}
        load_binary = lambda *_: (1, 0, 0, 0, 1024)

@jit
def wrong(x_ptr):
    tl.store(x_ptr, no_such_name)

compiled, launched = [], []
driver.set_active(H100())
torch.cuda.set_device = lambda device: None
knobs.runtime.jit_post_compile_hook = lambda **said: compiled.append(said["fn"].name)

def run():
    for rows in (3, 4):  # one kernel
        swiglu._swiglu(swiglu._swiglu_kernel, torch.empty(rows, 64), torch.empty(rows, 32), swiglu.swiglu_config(4))
    swiglu._swiglu(swiglu._swiglu_backward_kernel, torch.empty(3, 64), torch.empty(3, 32), swiglu.swiglu_config(4))
    launch(ran.append, len(launched))

ran = []
compile_together(run, torch.device("cuda", 0))
assert sorted(compiled) == ["_swiglu_backward_kernel", "_swiglu_kernel"], compiled
assert not launched and not ran, (launched, ran)
run()
assert len(compiled) == 2 and len(launched) == 3 and ran == [3], (compiled, launched, ran)
try:
    compile_together(lambda: wrong[(1,)](torch.empty(1)), torch.device("cuda", 0))
except triton.CompilationError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("a kernel that cannot be compiled must be an error")
launch(ran.append, "after an error")
assert ran == [3, "after an error"], ran
compile_together(run, torch.device("cuda", 0))
assert ran == [3, "after an error"], ran
"""


@pytest.mark.slow
@pytest.mark.skipif(jit.triton is None, reason="Triton is not installed (a CPU PyTorch comes without it)")
def test_kernels_are_compiled_and_not_launched(tmp_path):
    """In a process of its own: here kernels are interpreted. Triton's driver, and so the GPU, is replaced."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    path = tmp_path / "without_a_gpu.py"  # a jit function's source must be in a file
    path.write_text(WITHOUT_A_GPU)
    done = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_step_compiles_nothing_by_itself_and_no_length_does_again(monkeypatch):
    config = DraftConfig(
        hidden_size=256,
        target_hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=4096,
        draft_vocab_size=1024,
        num_target_layers=8,
        layers=(1, 3, 4),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e4},
        max_position_embeddings=4096,
    )
    draft = Draft(config).to("cuda", torch.bfloat16)
    for p in draft.parameters():
        p.data.normal_(0.0, 0.02)
    draft.set_vocab(torch.arange(0, 4096, 4))
    optimizer = FlatAdamW(draft.trainable(), OptimConfig(optimizer="adamw"), 100, torch.bfloat16)
    head = TargetHead(torch.randn(4096, 256, dtype=torch.bfloat16, device="cuda"))
    engine = TTTEngine(draft, head, torch.ones(5, device="cuda"), chunk_rows=512)
    alone = []

    def note(**said):
        if not said["is_manual_warmup"]:
            alone.append(said["fn"].name)

    monkeypatch.setattr(jit.triton.knobs.runtime, "jit_post_compile_hook", note)
    for tokens in (1024, 777, 2000, 1333):
        batch = Batch(
            torch.randint(4096, (tokens,)), torch.ones(tokens, dtype=torch.bool), (tokens // 3, tokens - tokens // 3)
        )
        wide = torch.randn(tokens, 4 * 256, dtype=torch.bfloat16, device="cuda")
        features = Features(wide[:, : 3 * 256].contiguous(), wide[:, 3 * 256 :].contiguous())
        optimizer.step(engine.step(batch, features, optimizer.grads).live[0].sum())
        engine.rows(batch, features)
    assert alone == []
    assert all(bool(p.isfinite().all()) for p in draft.trainable().values())
