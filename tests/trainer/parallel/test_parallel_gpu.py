"""Engines and shared clips over NCCL, as users launch them, on two GPUs: what they learn is what
one process learns, or two under plain data parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import arguments_of, assert_the_same_run, with_settings

pytestmark = pytest.mark.gpu2
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = (
    *("train.lr=0.01", "train.gradient_accumulation=2", "train.caption_dropout=0.5"),
    "memory.recompute=all_but_attention",
    *("validate.prompts=a wave", "validate.frames=9", "validate.every=2"),
)


def launch(file: str, processes: int, *runs: list[str]) -> None:
    """Training runs one after another under a launch file."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"launch/{file}", "--num_processes", str(processes)]
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "tests/helpers/train_runs.py", json.dumps(runs)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=["wan", "hunyuan"])
def settings(request, videos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the settings of a run, beside those of `alone`, one process, and `apart`, two with
    clips of their own, have been made."""
    assert torch.cuda.device_count() > 1, "these tests need two GPUs"
    folder = tmp_path_factory.mktemp(request.param)
    settings = with_settings(
        arguments_of(request.param, videos, cache, folder / "alone"), *SETTINGS
    )
    launch("one_gpu.yaml", 1, settings)
    launch("ddp.yaml", 2, with_settings(settings, f"run.dir={folder / 'apart'}"))
    return settings, folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_engines_learn_the_same(settings, engine: str, tmp_path: Path):
    """Clips shared by both GPUs, stopped and resumed; and clips of their own."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    given, folder = settings
    shared = with_settings(given, f"run.dir={tmp_path / 'shared'}", "parallel.sequence=2")
    apart = with_settings(given, f"run.dir={tmp_path / 'apart'}")
    launch(f"{engine}.yaml", 2, with_settings(shared, "train.steps=2"), shared, apart)
    assert_the_same_run(tmp_path / "shared", folder / "alone")
    assert_the_same_run(tmp_path / "apart", folder / "apart")
