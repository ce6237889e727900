"""Runs that commit 69929e4 began still load, resume and sample.

`tests/fixtures/runs_69929e4/make.py` made them.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.loop import train
from longreel.trainer.run.metrics import read_rows
from longreel.trainer.sampling import generate, load_pipeline

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs_69929e4"
SPREAD = json.loads((FIXTURES / "spread.json").read_text())
FACTOR = 8  # of the greatest distance between repetitions on other instruction sets
SPEC = importlib.util.spec_from_file_location("make_old_runs", FIXTURES / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


@pytest.fixture(params=make.RUNS)
def old_run(request, tmp_path, monkeypatch):
    """A family and the folder of its run, stopped after the second of four steps."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "videos", "videos")
    run_dir = Path("runs") / request.param
    shutil.copytree(FIXTURES / request.param / "run", run_dir)
    return request.param, run_dir


def test_it_resumes_under_the_settings_that_it_was_given(old_run):
    family, run_dir = old_run
    train(Job.from_config(load(make.arguments(family, run_dir))))
    steps = [row["step"] for row in read_rows(run_dir / "metrics.csv")]
    assert steps == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "4",
    ]  # with a validation before the first and the last
    ours = load_file(run_dir / "pytorch_lora_weights.safetensors")
    theirs = load_file(FIXTURES / family / "adapter.safetensors")
    started = load_file(
        FIXTURES / family / "run/checkpoints/step-000002/pytorch_lora_weights.safetensors"
    )
    bound = FACTOR * max(SPREAD[family]["adapter"])
    assert make.distance(ours, theirs) < bound < make.distance(started, theirs) / 100


def test_its_adapter_samples_the_same_video(old_run, tmp_path):
    family, _ = old_run
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(
        FIXTURES / family / "adapter.safetensors", folder / "pytorch_lora_weights.safetensors"
    )
    pipe = load_pipeline(folder, cache_dir=tmp_path / "cache")
    sampled = make.sample(pipe, generate, family)
    expected = np.load(FIXTURES / family / "sampled.npy")
    bound = FACTOR * max(SPREAD[family]["pixels"]) + 1 / expected.size  # one may round elsewhere
    assert abs(sampled.astype(float) - expected).mean() <= bound < expected.std() / 50
