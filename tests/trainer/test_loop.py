"""A run as a whole: it learns, stops anywhere, goes on exactly, and refuses what cannot work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import Interrupted, rows, stop_at, train
from safetensors.torch import load_file
from tiny import WAN

from longreel.data.sampler import SeededBatches
from longreel.sparse.patterns import Spatial
from longreel.trainer import job, loop
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.config.recipe import load_file as load_config
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families.wan.blocks import WanTransformerBlock
from longreel.trainer.job import Job
from longreel.trainer.run import checkpoint, metrics
from longreel.trainer.run.saving import Saver
from longreel.trainer.sampling.validate import Validator
from longreel.trainer.step import Learner

ROOT = Path(__file__).resolve().parents[2]


def test_resumed_equals_uninterrupted(arguments, tmp_path, monkeypatch):
    """Bit for bit on a CPU, with dropout, accumulation, a schedule; stopped past the last save."""
    settings = [
        "lora.dropout=0.1",
        "train.gradient_accumulation=2",
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
    one, two = load_file(whole / lora.WEIGHTS), load_file(resumed / lora.WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    assert rows(whole) == rows(resumed)
    states = [
        load_file(run / "checkpoints/step-000004/state.safetensors") for run in (whole, resumed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


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
    assert tuple(table[0]) == tuple(c for c in metrics.COLUMNS if c not in metrics.MEASURED)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_on_two_processes(arguments, tmp_path, monkeypatch, caplog):
    """Data parallel over gloo, with workers that read the cache. The run that stops tries a step
    each time, the other none. One process goes on with the clips that come next."""
    settings = [*arguments, "train.gradient_accumulation=2", "lora.dropout=0.1", "train.workers=1"]

    def launch(run_dir: Path, steps: int, *more: str) -> None:
        given = [a for a in settings if not a.startswith(("run.dir", "train.steps"))]
        given += [f"run.dir={run_dir}", f"train.steps={steps}", *more]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "train.py", *given]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]

    launch(tmp_path / "whole", 4)
    launch(tmp_path / "halves", 2, "memory.trial_step=true")
    launch(tmp_path / "halves", 4, "memory.trial_step=true")
    one, two = (tmp_path / name / "checkpoints/step-000004" for name in ("whole", "halves"))
    assert (one / "state.safetensors").read_bytes() == (two / "state.safetensors").read_bytes()
    losses = [
        [row["loss"] for row in rows(tmp_path / name) if row["loss"]]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    clips = []
    real = Learner.loss

    def loss(self, batch, step, micro):
        clips.append(batch["ids"])
        return real(self, batch, step, micro)

    monkeypatch.setattr(Learner, "loss", loss)
    trainer = train(settings, f"run.dir={tmp_path / 'halves'}", "train.steps=5")
    assert (
        "written by 2 processes, and there are 1" in caplog.text
        and "0.5 times as many clips" in caplog.text
    )
    ids = [entry.id for entry in trainer.data.clips.entries]
    stream = SeededBatches(len(ids), 1, 0)
    drawn = 4 * 2 * 2  # steps, processes, batches
    assert clips == [[ids[i] for i in stream.batch_at(drawn + batch)] for batch in range(2)]
    saved = checkpoint.load_progress(tmp_path / "halves/checkpoints/step-000005")
    assert (saved.world_size, saved.drawn) == (1, [drawn + 2])


def test_a_finished_run_is_left_alone(arguments):
    first = train(arguments)
    before = (first.run_dir / lora.WEIGHTS).read_bytes()
    table = rows(first.run_dir)
    train(arguments)
    assert (first.run_dir / lora.WEIGHTS).read_bytes() == before
    assert rows(first.run_dir) == table


def test_other_settings_do_not_resume(arguments, tmp_path):
    train(arguments, "train.steps=2")
    with pytest.raises(
        ConfigError, match=r"lora\.alpha: 4\.0 -> 8\.0; .*lora\.rank: 4 -> 8.*run\.dir"
    ):
        train(arguments, "lora.rank=8")
    for held in ("validate.videos=2", "validate.sigmas=[0.5]", "train.schedule=cosine"):
        with pytest.raises(ConfigError, match=held.partition("=")[0].replace(".", r"\.")):
            train(arguments, held)
    train(arguments, "train.steps=3", "validate.every=1", "checkpoint.every=1")  # these may change
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)  # and so may the place, and the recipe's name
    train([f"recipe={moved / 'config.yaml'}", f"run.dir={moved}", "train.steps=4"])
    assert checkpoint.latest(moved / "checkpoints").name == "step-000004"


def test_a_density_resumes_as_it_was_asked_for(arguments):
    """Not as the width that it came to; a run from before the setting was there goes on too."""
    spatial = "sparse.pattern.name=spatial"
    with pytest.raises(ConfigError, match="sparse.density=0.3: dense has no width for it to set"):
        train(arguments, "sparse.pattern.name=dense", "sparse.density=0.3")
    run_dir = train(arguments, spatial, "sparse.density=0.4", "train.steps=2").run_dir
    for other in ("sparse.density=0.5", "sparse.density=null"):
        with pytest.raises(
            ConfigError, match=r"other settings \(sparse.density: 0.4 -> (0.5|None)"
        ):
            train(arguments, spatial, other)
    train(arguments, spatial, "sparse.density=0.4", "train.steps=3")

    older = train(arguments, "train.steps=2", f"run.dir={run_dir}-older").run_dir
    path = older / "config.yaml"
    saved = path.read_text()
    path.write_text(saved.replace("  density: null\n", ""))
    assert len(path.read_text()) < len(saved)
    train(arguments, "train.steps=3", f"run.dir={older}")
    assert checkpoint.latest(older / "checkpoints").name == "step-000003"


def test_another_solved_width_does_not_resume(arguments, monkeypatch):
    """A change of the solver gives one: the run would go on under another mask."""
    settings = ["sparse.pattern.name=spatial", "sparse.density=0.7"]
    train(arguments, *settings, "train.steps=2")
    monkeypatch.setattr(job, "with_density", lambda *_: (Spatial(half_width=1.0), 0.3))
    with pytest.raises(ConfigError, match=r"trained under .*'half_width': .* now gives .*1\.0"):
        train(arguments, *settings)


def test_other_clips_do_not_resume(arguments, videos, tmp_path):
    other = tmp_path / "videos"
    shutil.copytree(videos, other)
    train(arguments, "train.steps=2", f"data.path={other}")
    train(arguments, "train.steps=3")  # the same clips in another place
    for suffix in (".mp4", ".txt"):
        for index in range(3):
            (other / f"{index}{suffix}").rename(other / f"new-{index}{suffix}")
    with pytest.raises(ConfigError, match="other clips than data.path now gives"):
        train(arguments, f"data.path={other}")


def test_the_adapter_is_published_again_if_the_run_died_before(arguments, monkeypatch):
    def dies(*args):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "publish", dies)
        with pytest.raises(Interrupted):
            train(arguments, "train.steps=2")
    run_dir = train(arguments, "train.steps=2").run_dir
    newest = run_dir / "checkpoints/step-000002" / lora.WEIGHTS
    assert (run_dir / lora.WEIGHTS).read_bytes() == newest.read_bytes()


def test_validation_that_was_cut_short_is_made_up_for(arguments, monkeypatch):
    settings = [*arguments, "validate.prompts=a wave", "validate.frames=5", "train.steps=2"]
    cut_short = []
    real = Validator._sample

    def sample(self, prompt, path):
        if path.stem.startswith("step-000002") and not cut_short:
            cut_short.append(path)
            raise Interrupted
        real(self, prompt, path)

    monkeypatch.setattr(Validator, "_sample", sample)
    with pytest.raises(Interrupted):
        train(settings)
    run_dir = train(settings).run_dir
    assert [row["step"] for row in rows(run_dir) if row["heldout_loss_target"]] == ["0", "2"]
    written = cut_short[0].stat().st_mtime_ns
    train(settings)
    assert cut_short[0].stat().st_mtime_ns == written


def test_torn_checkpoints_are_not_kept_in_place_of_whole_ones(arguments):
    run_dir = train(arguments).run_dir
    (run_dir / "checkpoints/step-000004-mine").mkdir()  # a user's copy
    newest = run_dir / "checkpoints/step-000004/state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    train(arguments, "checkpoint.keep_last=1", "checkpoint.every=3", "train.steps=3")
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004-mine"]


KILLED = """
import os, signal, sys
import longreel.trainer.run.checkpoint as checkpoint
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


@pytest.mark.parametrize("place", [pytest.param("save_file", marks=pytest.mark.slow), "rename"])
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


def test_a_torn_checkpoint_is_passed_over_and_no_run_begins_anew_over_them(arguments):
    run_dir = train(arguments).run_dir
    tensors = [run_dir / f"checkpoints/step-{step:06d}/state.safetensors" for step in (4, 2)]
    tensors[0].write_bytes(tensors[0].read_bytes()[:100])
    assert checkpoint.latest(run_dir / "checkpoints").name == "step-000002"
    tensors[1].write_bytes(tensors[1].read_bytes()[:100])
    with pytest.raises(
        ConfigError, match="No checkpoint in .* can be read, and a new run would replace them"
    ):
        train(arguments)
    assert all(path.stat().st_size == 100 for path in tensors)


def test_a_removal_that_is_cut_short_leaves_no_torn_checkpoint(tmp_path, monkeypatch):
    def save(step):
        state = checkpoint.State({"a": torch.ones(2)})
        checkpoint.save(tmp_path, state, checkpoint.Progress(step, 1, "", [0]), keep_last=1)

    def cut_short(folder, **options):
        (folder / checkpoint.TENSORS).unlink()
        raise Interrupted

    save(1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint.shutil, "rmtree", cut_short)
        save(2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]
    save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_run_out_of_memory_loses_no_step(arguments, tmp_path, monkeypatch, kind):
    """It ends with its last whole step saved and names what helps, with which it goes on."""
    whole = train(arguments, "checkpoint.every=100", f"run.dir={tmp_path / 'whole'}").run_dir
    loss = Learner.loss

    def failing(self, batch, step, micro):
        if step == 4:
            raise kind("CUDA out of memory. Tried to allocate 85.00 GiB.\nmore")
        return loss(self, batch, step, micro)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss", failing)
        with pytest.raises(SystemExit) as caught:
            train(arguments, "checkpoint.every=100", "memory.recompute=none")
    saved = checkpoint.latest(tmp_path / "run/checkpoints")
    assert saved.name == "step-000003"
    assert str(caught.value).splitlines() == [
        "error: out of memory: CUDA out of memory. Tried to allocate 85.00 GiB.",
        f"Step 3 is saved in {saved}: the same command continues from there.",
        "Remedies, the cheapest first: memory.recompute=all_but_attention; then "
        "memory.recompute=all.",
    ]
    train(arguments, "checkpoint.every=100", "memory.recompute=all")
    one, two = (load_file(run / lora.WEIGHTS) for run in (whole, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_out_of_memory_in_the_optimizer_saves_nothing_torn(arguments, tmp_path, monkeypatch):
    def torn(self, *_):
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(7)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    train(arguments, "train.steps=2")
    before = (tmp_path / "run/checkpoints/step-000002/state.safetensors").read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    with pytest.raises(
        SystemExit, match="Step 2 is saved in .*step-000002: the same command continues"
    ):
        train(arguments, "checkpoint.every=100")
    newest = checkpoint.latest(tmp_path / "run/checkpoints")
    assert newest.name == "step-000002"
    assert (newest / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames=18", "frames=18 and extend.factor=2 disagree"),
        ("validate.frames=6", "validate.frames"),
        ("extend.native=10", r"extend\.native: frames=10"),
        ("height=100", "height=100 must be a multiple of 16"),
        ("data.path=/no/such/folder", "data.path=/no/such/folder is not a folder"),
        ("sparse.dense_layers=9", "the model has 3 layers"),
        ("sparse.dense_steps=[0,2]", r"\[2\] are not among the validate.steps=2"),
        ("sparse.dense_layers=[0,3]", r"sparse.dense_layers=\[0, 3\], but the model has 3 layers"),
        ("sparse.dense_layers=[-4]", r"sparse.dense_layers=\[-4\], but the model has 3 layers"),
        ("model.path=/no/such/model", "hf download"),
        ("family=sora", "family=sora is unknown. Families: wan"),
    ],
)
def test_refused_before_anything_heavy(arguments, override, message):
    key = override.partition("=")[0]
    given = [a for a in arguments if not a.startswith(key + "=")]
    with pytest.raises(ConfigError, match=message):
        Job.from_config(load([*given, override]))


def test_heads_that_the_kernels_do_not_take_are_refused(arguments, monkeypatch):
    """3 heads of a model 144 wide, say."""
    real = type(WAN).read_geometry
    monkeypatch.setattr(
        type(WAN), "read_geometry", lambda *a: replace(real(*a), heads=3, head_dim=48)
    )
    with pytest.raises(ConfigError, match=r"heads have 48 channels; the kernels take \(16, 32, 64"):
        Job.from_config(load(arguments))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extend.factor=4"], r"17 frames at 16 fps.*33 needed"),
        (["validate.videos=3"], "leaves none to train on"),
        (["lora.targets=no.such.layer"], "matches no module"),
        (["sparse.backend=flex"], "no gradients on a CPU"),
        (
            ["sparse.density=0.01"],
            "^sparse.density=0.01 is out of reach: decay from .* takes Radial",
        ),
    ],
)
def test_refused_by_what_the_files_hold(arguments, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(arguments, *overrides)


def test_data_path_is_required(arguments):
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        loop.train(Job.from_config(load([a for a in arguments if not a.startswith("data.path")])))


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_precision_is_the_recipe_s(arguments, tmp_path, monkeypatch, mode):
    """Whatever accelerate is configured to do."""
    plain = train(arguments, "train.steps=1", f"run.dir={tmp_path / 'plain'}").run_dir
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mode)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rows(train(arguments, "train.steps=1").run_dir) == rows(plain)


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
    """It logs offline without a key; if it breaks, the run does not."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    run_dir = train(arguments, "log.wandb=true", "train.steps=2").run_dir
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    name = (run_dir / "wandb_id").read_text()
    train(arguments, "log.wandb=true", "train.steps=3")
    assert (run_dir / "wandb_id").read_text() == name
    shutil.rmtree(run_dir)
    train(arguments, "log.wandb=true", "train.steps=2")
    assert (run_dir / "wandb_id").read_text() != name
    import wandb

    def broken(*args, **kwargs):
        raise RuntimeError("no space left on device")

    for place, name in ((wandb, "init"), (wandb, "Image"), (wandb.Run, "log")):
        other = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            train(arguments, "log.wandb=true", "train.steps=2", f"run.dir={other}")
        assert rows(other) == rows(run_dir)


def losses(run_dir: Path) -> list[float]:
    """Return the losses of the training steps."""
    return [float(row["loss"]) for row in rows(run_dir) if row["loss"]]


def test_fused_kernels_are_the_recipe_s_choice(arguments, tmp_path):
    """The same numbers but for the rounding of gradients."""
    stock = losses(train(arguments).run_dir)
    fused = "speed.fused_norms=true", "speed.fused_modulation=true"
    trainer = train(arguments, *fused, f"run.dir={tmp_path / 'fused'}")
    for block in trainer.learner.transformer.blocks:
        assert isinstance(block, WanTransformerBlock) and block.attn1.processor.fused_norms
    assert losses(trainer.run_dir) == pytest.approx(stock, rel=1e-4) and len(stock) == 4
