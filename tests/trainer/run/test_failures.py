"""Test what a run survives, and how it ends where it cannot: nothing that it has learnt is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from runs import rows, train, with_settings
from safetensors import SafetensorError
from safetensors.torch import load_file

from longreel.data.files import read_tensors, save_tensors
from longreel.trainer import loop
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.run import checkpoint, resume, signals
from longreel.trainer.run.metrics import Metrics
from longreel.trainer.run.saving import Saver
from longreel.trainer.step import Learner


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(3, action)`: do something when the update of step 3 begins."""

    def install(step: int, action) -> None:
        real = Learner.update

        def update(self, current, batches):
            if current == step:
                action()
            return real(self, current, batches)

        monkeypatch.setattr(Learner, "update", update)

    return install


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / lora.WEIGHTS)


def assert_same(one: Path, two: Path) -> None:
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


# Asked for from outside


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step(arguments, tmp_path, at_step, monkeypatch, number):
    whole = train(arguments, f"run.dir={tmp_path / 'whole'}").run_dir
    before = signal.getsignal(number)
    with monkeypatch.context():
        at_step(3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            train(arguments, "checkpoint.every=100")
        monkeypatch.undo()
    assert caught.value.code == signals.REQUEUE == 75
    assert signal.getsignal(number) == before
    run_dir = tmp_path / "run"
    assert saved_steps(run_dir) == [3]
    train(arguments, "checkpoint.every=100")  # the same command
    assert_same(run_dir, whole)
    assert rows(run_dir) == rows(whole)


def test_a_signal_in_the_last_step_is_no_reason_to_requeue(arguments, at_step):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert saved_steps(train(arguments).run_dir) == [2, 4]


def test_a_file_asks_for_a_save(arguments, tmp_path, at_step):
    request = tmp_path / "run" / "save"
    at_step(1, request.touch)
    run_dir = train(arguments, "checkpoint.every=100").run_dir
    assert saved_steps(run_dir) == [1, 4] and not request.exists()


def test_minutes_count_as_well_as_steps(arguments, tmp_path):
    settings = ["checkpoint.every=100", "checkpoint.keep_last=9"]
    often = train(arguments, *settings, "checkpoint.every_minutes=0.00001").run_dir
    assert saved_steps(often) == [1, 2, 3, 4]
    never = [*settings, "checkpoint.every_minutes=0", f"run.dir={tmp_path / 'never'}"]
    assert saved_steps(train(arguments, *never).run_dir) == [4]


def test_settings_out_of_range_are_refused(arguments):
    for setting in ("checkpoint.every_minutes", "checkpoint.retry_minutes", "train.max_skips"):
        with pytest.raises(ConfigError, match=f"{setting}=-1.* must not be negative"):
            load([*arguments, f"{setting}=-1"])
    with pytest.raises(ConfigError, match="parallel.timeout=0.0 must be positive"):
        load([*arguments, "parallel.timeout=0"])


# A disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_full_disk_loses_nothing(arguments, tmp_path, small_disk, at_step, monkeypatch, caplog):
    """It is full from step 3 on, until someone frees it while the last save is tried again."""
    sampled = ["validate.prompts=a wave", "validate.frames=5", "checkpoint.every=1"]
    whole = train(arguments, *sampled, f"run.dir={tmp_path / 'whole'}").run_dir
    ballast, run_dir, waited = small_disk / "ballast", small_disk / "run", []

    def wait(seconds: float) -> None:
        assert saved_steps(run_dir) == [1, 2]
        assert checkpoint.latest(run_dir / "checkpoints").name == "step-000002"
        waited.append(seconds)
        if len(waited) == 2:
            ballast.unlink()

    monkeypatch.setattr(loop, "Saver", partial(Saver, wait=wait))
    at_step(3, lambda: fill(ballast))
    train(arguments, *sampled, f"run.dir={run_dir}")
    assert waited == [10.0, 10.0]
    assert_same(run_dir, whole)
    assert rows(run_dir) == rows(whole)
    states = [run / "checkpoints/step-000004/state.safetensors" for run in (run_dir, whole)]
    assert states[0].read_bytes() == states[1].read_bytes()
    assert "Step 3 could not be saved" in caplog.text
    assert "step-000004-0.mp4" not in caplog.text  # the last sample came after


def test_a_disk_that_stays_full_ends_the_run(arguments, small_disk, at_step, monkeypatch):
    run_dir = small_disk / "run"
    at_step(4, lambda: fill(small_disk / "ballast"))
    given = [*arguments, "checkpoint.retry_minutes=0", f"run.dir={run_dir}"]
    with pytest.raises(SystemExit, match="step 4 could not be saved within .*=0"):
        train(given)
    assert saved_steps(run_dir) == [2]
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    train(given)
    assert saved_steps(run_dir) == [2, 4]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), SafetensorError("No space")])
def test_a_save_that_fails_is_tried_again_later(arguments, tmp_path, monkeypatch, error):
    """Training goes on in between; nothing of the failed ones stays."""
    real, failed = checkpoint.save_file, []

    def save_file(tensors, path):
        real(tensors, path)
        if len(failed) < 2:
            failed.append(sorted(p.name for p in path.parents[1].iterdir()))
            raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr("longreel.trainer.run.saving.RETRY_SECONDS", 0.0)
    run_dir = train(arguments, "checkpoint.every=1", "checkpoint.keep_last=9").run_dir
    assert failed == [[".tmp-step-000001"], [".tmp-step-000002"]]
    assert saved_steps(run_dir) == [3, 4]
    whole = train(arguments, f"run.dir={tmp_path / 'whole'}").run_dir
    assert_same(run_dir, whole)


def test_lines_wait_for_room_in_order(tmp_path, small_disk):
    metrics = Metrics(small_disk, resumed_step=0)
    metrics.write({"step": 1, "loss": 0.5})
    fill(small_disk / "ballast")
    long = "x" * 5000  # more than the file's last block has room for
    metrics.write({"step": 2, "loss": 0.25, "attention_layer_speedup": long})
    metrics.write({"step": 3, "loss": 0.125})
    assert [row["step"] for row in metrics.rows()] == ["1"]
    (small_disk / "ballast").unlink()
    metrics.write({"step": 4, "loss": 1.0})
    assert [row["step"] for row in metrics.rows()] == ["1", "2", "3", "4"]
    assert metrics.rows()[1]["attention_layer_speedup"] == long


def test_processes_go_on_from_one_checkpoint(arguments, monkeypatch):
    """Another process sees files late, or never, as where each machine has a disk of its
    own."""
    train(arguments, "train.steps=2")
    late = [None, "step-000002"]
    monkeypatch.setattr(resume, "LOOK_AFTER", (0, 0.01))
    monkeypatch.setattr(resume, "gather_object", lambda seen: [*seen, late.pop(0)])
    train(arguments, "train.steps=3")
    assert not late
    monkeypatch.setattr(resume, "gather_object", lambda seen: [*seen, None])
    with pytest.raises(ConfigError, match="step-000003 on process 0, None on process 1. run.dir"):
        train(arguments)


# Numbers that are none


def test_a_loss_that_is_not_finite_is_skipped(arguments, tmp_path, monkeypatch, caplog):
    """It is as if the step had never been, but for the clips and noise that it used up."""
    real = Learner.loss

    def loss(self, batch, step, micro):
        value = real(self, batch, step, micro)
        return value * float("inf") if (step, micro) in ((2, 1), (4, 0)) else value

    monkeypatch.setattr(Learner, "loss", loss)
    seen: dict[int, list[torch.Tensor]] = {}
    update = Learner.update

    def watched(self, step, batches):
        row = update(self, step, batches)
        state = checkpoint.gather(self.parameters, self.optimizer)
        seen[step] = [x.clone() for x in state.as_file().values()]
        seen[step] += [torch.tensor(n) for n in state.adam_steps.values()]
        return row

    monkeypatch.setattr(Learner, "update", watched)
    run_dir = train(
        arguments, "train.gradient_accumulation=2", "train.max_skips=1", "train.steps=4"
    ).run_dir
    assert all(map(torch.equal, seen[1], seen[2])) and all(map(torch.equal, seen[3], seen[4]))
    assert not all(map(torch.equal, seen[2], seen[3]))
    losses = [float(row["loss"]) for row in rows(run_dir) if row["loss"]]
    assert [value == value and value < 1e9 for value in losses] == [True, False, True, False]
    assert "No update at step 2: loss inf" in caplog.text and ".mp4" in caplog.text


def test_a_gradient_that_is_not_finite_is_skipped(arguments, monkeypatch, caplog):
    real = Learner.loss

    def loss(self, batch, step, micro):
        value = real(self, batch, step, micro)
        if step == 2:
            value.register_hook(lambda grad: grad * float("nan"))
        return value

    monkeypatch.setattr(Learner, "loss", loss)
    trainer = train(arguments, "train.steps=3")
    assert all(parameter.isfinite().all() for parameter in trainer.learner.parameters.values())
    assert "gradient norm nan, with one of" in caplog.text


def test_too_many_in_a_row_end_the_run(arguments, tmp_path, monkeypatch):
    real = Learner.loss

    def loss(self, batch, step, micro):
        return real(self, batch, step, micro) * (float("nan") if step > 2 else 1)

    monkeypatch.setattr(Learner, "loss", loss)
    with pytest.raises(
        SystemExit,
        match=r"(?s)step 5: loss nan.*\.mp4.*3 consecutive bad steps exceed train\.max_skips=2",
    ):
        train(arguments, "train.steps=9", "train.max_skips=2", "checkpoint.every=2")
    newest = checkpoint.latest(tmp_path / "run/checkpoints")
    assert newest.name == "step-000004"
    tensors = load_file(newest / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def spoil_a_clip(cache: Path) -> str:
    """One clip's latents become NaN; returns its file's name."""
    for file in sorted(cache.rglob("*.safetensors")):
        tensors, about = read_tensors(file)
        if "latents" in tensors:
            save_tensors(file, {"latents": tensors["latents"] * float("nan")}, about)
            return file.name
    raise AssertionError("no latents in the cache")


@pytest.mark.long
def test_two_processes_agree(arguments, tmp_path):
    """On skipping a clip of NaNs that one of them meets, sharing clips and data parallel; then on
    a signal that one of them gets."""
    settings = with_settings(arguments, f"cache.dir={tmp_path / 'cache'}", "train.max_skips=9")
    settings = with_settings(settings, "validate.videos=0", "height=48", "width=48")
    train(settings, "train.steps=1", f"run.dir={tmp_path / 'first'}")
    spoil_a_clip(tmp_path / "cache")
    runs = [
        with_settings(settings, f"run.dir={tmp_path / 'shared'}", "parallel.sequence=2"),
        with_settings(settings, f"run.dir={tmp_path / 'data'}", "train.steps=6"),
    ]
    failure = json.dumps({"kind": "signal", "rank": 1, "step": 5})
    started = processes.start(2, "tests/helpers/failing_runs.py", failure, json.dumps(runs))
    ended = processes.finish(started)
    assert [code for code, _ in ended] == [signals.REQUEUE] * 2, ended
    for name in ("data", "shared"):
        losses = [float(row["loss"]) for row in rows(tmp_path / name) if row["loss"]]
        finite = [loss == loss for loss in losses]
        assert any(finite) and not all(finite), losses
        tensors = load_file(checkpoint.latest(tmp_path / name / "checkpoints") / checkpoint.TENSORS)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    said = " ".join(ended[0][1].split())
    assert "No update at step" in said and "on process 1" in said and "on process 0" in said
    assert saved_steps(tmp_path / "data")[-1] == 5


# Processes and networks that are gone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [("kill", "process 1 is dead or cut off"), ("hang", "process 1 in step 3: forward of batch 0")],
)
def test_a_run_with_a_lost_process_ends_within_a_minute(arguments, tmp_path, kind, said):
    """The limit of a run that hangs is its parallel.timeout, of 6 seconds here."""
    run = with_settings(arguments, "parallel.timeout=0.1", "checkpoint.every=1")
    failure = json.dumps({"kind": kind, "rank": 1, "step": 3})
    started = processes.start(2, "tests/helpers/failing_runs.py", failure, json.dumps([run]))
    checkpoints = tmp_path / "run/checkpoints"
    while not (checkpoints / "step-000002").exists():
        time.sleep(0.1)
        assert started[0].poll() is None
    began = time.monotonic()
    (code, text), (other, _) = processes.finish(started)
    spent = time.monotonic() - began
    assert code == 1 and said in text, text
    assert other == (-signal.SIGKILL if kind == "kill" else 1)
    assert spent < 60
    assert checkpoint.latest(checkpoints).name == "step-000002"


@pytest.mark.slow
def test_others_may_wait_for_a_slow_validation_or_disk(arguments, tmp_path):
    """They wait for 8 seconds each, where a part of a step may take 6."""
    settings = ["parallel.timeout=0.1", "checkpoint.every=2", "validate.every=2"]
    failure = json.dumps({"kind": "slow", "rank": 0, "step": 2})
    run = with_settings(arguments, *settings)
    ended = processes.finish(
        processes.start(2, "tests/helpers/failing_runs.py", failure, json.dumps([run]))
    )
    assert [code for code, _ in ended] == [0, 0], ended
    assert saved_steps(tmp_path / "run") == [2, 4]


@pytest.mark.slow
def test_killed_anywhere_a_run_goes_on_as_if_it_had_not_been():
    """A few kills of what `kill_and_resume.py` does 20 times."""
    script = Path(__file__).parents[1] / "kill_and_resume.py"
    command = [sys.executable, str(script), "kills=5", "train.steps=30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills" in done.stdout and "bit for bit" in done.stdout


@pytest.mark.slow  # wandb tries for a minute
def test_a_wandb_that_cannot_be_reached_stops_nothing(arguments, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    run_dir = train(arguments, "log.wandb=true", "train.steps=2").run_dir
    assert len([row for row in rows(run_dir) if row["loss"]]) == 2
    assert "wandb is off from here on" in " ".join(capsys.readouterr().out.split())
