"""A run as a whole: it learns, stops anywhere, goes on exactly, and refuses what cannot work."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longreel.trainer import checkpoint, lora, metrics
from longreel.trainer.config import ConfigError, load
from longreel.trainer.config import load_file as load_config
from longreel.trainer.job import Job
from longreel.trainer.loop import Trainer, lr_factor

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds_per_step", "tokens_per_second", "peak_memory_gib")


def train(arguments: list[str], *overrides: str) -> Trainer:
    given = dict(argument.partition("=")[::2] for argument in [*arguments, *overrides])
    trainer = Trainer(Job.from_config(load([f"{k}={v}" for k, v in given.items()])))
    trainer.fit()
    return trainer


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


class Interrupted(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run ends without notice when it reaches an optimizer update."""
    real = Trainer._step

    def stopping(self: Trainer, current: int, batches):
        if current == step:
            raise Interrupted
        return real(self, current, batches)

    monkeypatch.setattr(Trainer, "_step", stopping)


def test_resumed_equals_uninterrupted(arguments, tmp_path, monkeypatch):
    """Bit for bit on a CPU, with dropout, accumulation, a schedule; stopped past the last save."""
    settings = [
        "lora.dropout=0.1",
        "train.accumulate=2",
        "train.batch=2",
        "train.schedule=cosine",
        "validate.every=1",
    ]
    whole = train(arguments, *settings, f"run.dir={tmp_path / 'whole'}").run_dir
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(arguments, *settings)
    resumed = train(arguments, *settings).run_dir
    assert (whole / lora.WEIGHTS).read_bytes() != b""
    one, two = load_file(whole / lora.WEIGHTS), load_file(resumed / lora.WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    assert rows(whole) == rows(resumed)
    states = [
        load_file(run / "checkpoints/step-000004/state.safetensors") for run in (whole, resumed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_validation_and_samples_leave_training_alone(arguments, tmp_path):
    plain = train(arguments, "validate.every=100", "train.steps=2", f"run.dir={tmp_path / 'a'}")
    watched = train(
        arguments,
        "validate.every=1",
        "train.steps=2",
        "validate.prompts=a wave",
        "validate.frames=5",
        f"run.dir={tmp_path / 'b'}",
    )
    one, two = (load_file(trainer.run_dir / lora.WEIGHTS) for trainer in (plain, watched))
    assert all(torch.equal(one[name], two[name]) for name in one)
    samples = sorted(path.name for path in (tmp_path / "b/samples").iterdir())
    assert samples == ["step-000000-0.mp4", "step-000001-0.mp4", "step-000002-0.mp4"]


def test_what_a_run_leaves_behind(arguments, tmp_path):
    run_dir = train(arguments, "checkpoint.every=1").run_dir
    for name in (lora.WEIGHTS, "config.yaml", "metrics.csv", "mask.png", "loss.png"):
        assert (run_dir / name).stat().st_size > 0
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
    ]
    saved = load_config(run_dir / "config.yaml")
    assert saved.frames == 17 and saved.fps == 16 and saved.lora.alpha == 4
    entry = lora.read_entry(run_dir)
    assert (entry["native_frames"], entry["frames"]) == (9, 17)
    assert entry["pattern"]["name"] == "radial"
    table = rows(run_dir)
    assert [row["step"] for row in table] == ["0", "1", "2", "3", "4", "4"]
    assert tuple(table[0]) == tuple(c for c in metrics.COLUMNS if c not in TIMES)


def test_a_finished_run_is_left_alone(arguments):
    first = train(arguments)
    before = (first.run_dir / lora.WEIGHTS).read_bytes()
    table = rows(first.run_dir)
    train(arguments)
    assert (first.run_dir / lora.WEIGHTS).read_bytes() == before
    assert rows(first.run_dir) == table


def test_other_settings_do_not_resume(arguments):
    train(arguments, "train.steps=2")
    with pytest.raises(
        ConfigError, match=r"lora\.alpha: 4\.0 -> 8\.0; .*lora\.rank: 4 -> 8.*run\.dir"
    ):
        train(arguments, "lora.rank=8")
    train(arguments, "train.steps=3", "validate.every=1", "checkpoint.every=1")  # these may change


KILLED = """
import os, signal, sys
import longreel.trainer.checkpoint as checkpoint
from longreel.launch.commands import main

def die(*args):
    if len(list((checkpoint.Path(sys.argv[1]) / "checkpoints").glob("step-*"))):
        os.kill(os.getpid(), signal.SIGKILL)

place = sys.argv[2]
real = getattr(checkpoint, "save_file") if place == "save_file" else os.rename
def patched(*args):
    if place == "rename":
        die()
    real(*args)
    if place == "save_file":
        path = args[1]
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        die()
        path.write_bytes(whole)
if place == "rename":
    os.rename = patched
else:
    checkpoint.save_file = patched
main(["train", *sys.argv[3:]])
"""


@pytest.mark.parametrize("place", ["save_file", "rename"])
def test_killed_during_a_save(arguments, tmp_path, place):
    """SIGKILL in the second save, in the middle of the tensors or just before the rename."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(run_dir), place, *arguments]
    died = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert list((run_dir / "checkpoints").glob(".tmp-*"))
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    load_file(newest / "state.safetensors")
    train(arguments)  # the same command goes on
    assert checkpoint.latest(run_dir / "checkpoints").name == "step-000004"
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    whole = train(arguments, f"run.dir={tmp_path / 'whole'}").run_dir
    one, two = load_file(run_dir / lora.WEIGHTS), load_file(whole / lora.WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_torn_checkpoint_is_passed_over(arguments):
    run_dir = train(arguments).run_dir
    newest = run_dir / "checkpoints/step-000004/state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.latest(run_dir / "checkpoints").name == "step-000002"


def test_a_loss_that_is_not_finite_ends_the_run(arguments, monkeypatch):
    monkeypatch.setattr(Trainer, "_loss", lambda self, *_: self.parameters_sum() * float("nan"))
    monkeypatch.setattr(
        Trainer,
        "parameters_sum",
        lambda self: sum(p.sum() for p in self.parameters.values()),
        raising=False,
    )
    with pytest.raises(SystemExit, match=r"step 1: loss nan.*\.mp4"):
        train(arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames=18", "frames=18 and extend.factor=2 disagree"),
        ("extend.native=10", r"4k \+ 1"),
        ("validate.frames=6", "validate.frames"),
        ("height=100", "height=100 must be a multiple of 16"),
        ("data.path=/no/such/folder", "data.path=/no/such/folder is not a folder"),
        ("sparse.dense_layers=9", "the model has 3 layers"),
        ("model.path=/no/such/model", "hf download"),
        ("family=sora", "family=sora is unknown. Families: wan"),
    ],
)
def test_refused_before_anything_heavy(arguments, override, message):
    key = override.partition("=")[0]
    given = [a for a in arguments if not a.startswith(key + "=")]
    with pytest.raises(ConfigError, match=message):
        Job.from_config(load([*given, override]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extend.factor=4"], r"17 frames at 16 fps.*33 needed"),
        (["validate.clips=3"], "leaves none to train on"),
        (["lora.targets=no.such.layer"], "matches no module"),
    ],
)
def test_refused_by_what_the_files_hold(arguments, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(arguments, *overrides)


def test_data_path_is_required(arguments):
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        Trainer(Job.from_config(load([a for a in arguments if not a.startswith("data.path")])))


def test_main_prints_the_message_alone(arguments):
    process = subprocess.run(
        [sys.executable, "train.py", "recipe=tiny_wan", "lora.rnk=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.strip() == "error: lora.rnk is not a setting. Did you mean lora.rank?"


def test_wandb_offline_and_out_of_order(arguments, tmp_path, monkeypatch):
    """Without a key it logs offline; if it breaks, the run does not."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    run_dir = train(arguments, "log.wandb=true", "train.steps=2").run_dir
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    import wandb

    def broken(*args, **kwargs):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(wandb, "init", broken)
    other = train(arguments, "log.wandb=true", "train.steps=2", f"run.dir={tmp_path / 'other'}")
    assert len(rows(other.run_dir)) == len(rows(run_dir))


def test_lr_factor():
    assert [lr_factor(s, 4, 10, "constant") for s in (1, 4, 5, 10)] == [0.25, 1, 1, 1]
    cosine = [lr_factor(s, 2, 10, "cosine") for s in range(1, 11)]
    assert cosine[:2] == [0.5, 1.0] and cosine[-1] > 0
    assert all(a > b for a, b in zip(cosine[1:], cosine[2:], strict=False))
    assert lr_factor(1, 0, 5, "constant") == 1
