"""Test the advice to a run that will not fit, and to one that was out of memory."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from plans import job_of
from runs import train

from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Memory
from longreel.trainer.config.values import ConfigError
from longreel.trainer.plan import advice
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import GIB, training_memory
from longreel.trainer.run import checkpoint
from longreel.trainer.step import Learner


def test_remedies_come_in_order_until_it_fits():
    job = job_of("hunyuan_2x", memory=Memory(recompute="none"))
    model, tokens = anatomy(job), len(job.grid(job.frames))

    def found(gib):
        return advice.remedies(job.config, model, tokens, gib * GIB)[0]

    assert list(found(10_000)) == []
    assert list(found(140)) == ["memory.recompute=all_but_attention", "memory.offload=true"]
    everything = found(10)
    assert list(everything) == [
        "memory.recompute=all_but_attention",
        "memory.offload=true",
        "memory.offload_keep=0",
        "memory.recompute=all",
        "memory.mlp_chunk=16384",
        "lora.compute_dtype=bfloat16",
        "train.optimizer=adamw8bit",
        "memory.base_dtype=float8",
    ]
    assert list(everything.values()) == sorted(everything.values(), reverse=True)


def test_advice_ends_with_a_length_that_then_fits():
    """Or says that none does which would train."""
    job = job_of("hunyuan_4x", memory=Memory())
    model, tokens = anatomy(job), len(job.grid(job.frames))
    said = advice.advice(job, model, 75 * GIB)
    frames = int(said.rpartition("frames=")[2].partition(",")[0])
    _, knobs = advice.remedies(job.config, model, tokens, 75 * GIB)
    assert 125 <= frames < 509
    for length, fits in ((frames, True), (frames + 4, False)):
        assert (training_memory(model, len(job.grid(length)), knobs).peak <= 75 * GIB) == fits
    assert advice.advice(job, model, 30 * GIB).endswith("not even the native 125 frames fit")


@pytest.mark.parametrize("given", [
    [], ["memory.recompute=none"], ["memory.recompute=none", "sparse.backend=flex"],
])  # fmt: skip
def test_what_is_advised_loads(given):
    """Each setting is added to those before it, as far as one goes."""
    given = ["memory.offload=false", *given]
    job = job_of("hunyuan_2x", *given)
    settings = dict(setting.split("=") for setting in given)
    for setting in advice.remedies(job.config, anatomy(job), len(job.grid(job.frames)), 0)[0]:
        settings |= [setting.split("=")]
        load(["recipe=hunyuan_2x", *map("=".join, settings.items())])
    assert settings["memory.offload"] == "true"


@pytest.fixture
def gpu(monkeypatch):
    """A device with so many GiB."""

    def of(gib):
        monkeypatch.setattr(advice, "device_memory", lambda device: gib * GIB)
        return torch.device("cpu")

    return of


def test_a_run_is_checked_before_it_loads(gpu):
    job = job_of("wan_14b_2x", memory=Memory())
    assert advice.check_memory(job, gpu(200)) is None
    warning = advice.check_memory(job, gpu(120))
    assert warning and "predicted to take 135" in warning and "has 120.0 GiB" in warning
    assert "memory.offload=true (" in warning
    with pytest.raises(ConfigError, match="adapter alone take 29.7 GiB, and the GPU has 24.0 GiB"):
        advice.check_memory(job, gpu(24))


def test_a_cpu_is_not_checked():
    assert advice.check_memory(job_of("hunyuan_4x"), torch.device("cpu")) is None


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 7, as far as messages go."""
    folder = tmp_path / "step-000007"
    folder.mkdir()
    about = {"version": checkpoint.VERSION, "progress": asdict(checkpoint.Progress(7, 1, "", [7]))}
    (folder / checkpoint.STATE).write_text(json.dumps(about))
    return folder


def test_out_of_memory_on_a_gpu(gpu, saved):
    """Settings that the run may take up come first; the rest would be another run's, once one is
    saved."""
    job = job_of("wan_14b_2x", memory=Memory())
    kept, predicted, change = advice.how_to_go_on(job, gpu(60), saved).splitlines()
    assert kept == f"Step 7 is saved in {saved}: the same command continues from there."
    assert predicted.startswith("A step was predicted to take 135.")
    assert predicted.endswith("and the GPU has 60.0 GiB.")
    order = ["memory.offload=true (", "memory.mlp_chunk=16384 (", "in another run.dir, lora.comp"]
    assert [change.find(part) for part in order] == sorted(change.find(part) for part in order)
    assert all(part in change for part in order) and change.count("in another run.dir") == 1

    begins, *_, change = advice.how_to_go_on(job, gpu(60), None).splitlines()
    assert begins == "No step is saved yet: the same command starts the run again."
    assert "lora.compute_dtype" in change and "another run.dir" not in change


def test_out_of_memory_where_it_was_to_fit(gpu, saved):
    """The advice leaves less than what was predicted, and no greater length."""
    job = job_of("wan_14b_2x", memory=Memory())
    *_, predicted, change = advice.how_to_go_on(job, gpu(200), saved).splitlines()
    assert predicted.endswith("the GPU has 200.0 GiB: the prediction is too low.")
    assert "memory.offload=true (" in change and "frames=" not in change
    turned = "lora.compute_dtype=bfloat16", "train.optimizer=adamw8bit"
    memory = Memory(offload=True, offload_keep=0, mlp_chunk=16384, base_dtype="float8")
    least = job_of("wan_14b_2x", *turned, memory=memory)
    *_, change = advice.how_to_go_on(least, gpu(200), saved).splitlines()
    frames = int(change.rpartition("in another run.dir, frames=")[2].partition(",")[0])
    assert 81 <= frames < least.frames


def test_out_of_memory_where_nothing_is_planned(saved):
    """No peaks; and when no setting is left, what remains."""
    cpu = torch.device("cpu")
    *_, change = advice.how_to_go_on(job_of("wan_14b_2x", memory=Memory()), cpu, saved).splitlines()
    assert "memory.offload=true; then memory.offload_keep=0" in change and "GiB" not in change
    assert "train.optimizer" not in change
    least = job_of("wan_14b_2x", memory=Memory(offload=True, offload_keep=0, mlp_chunk=1))
    *_, change = advice.how_to_go_on(least, cpu, saved).splitlines()
    assert change.endswith(f"first: {advice.NO_SETTING}.")


def test_a_run_warns_and_explains(arguments, gpu, monkeypatch, capsys):
    """On a device that the smallest run does not fit: with a reserve of 2.5 GiB, none does."""
    gpu(1)

    def fail(self, step, batches):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(
        SystemExit, match="(?s)CUDA out of memory.*predicted to take 2.5 GiB.*Remedies"
    ):
        train(arguments)
    told = " ".join(capsys.readouterr().out.split())
    assert "A step is predicted to take 2.5 GiB, and the GPU has 1.0 GiB: it may run out." in told
