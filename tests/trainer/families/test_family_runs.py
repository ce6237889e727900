"""A whole run of each family: caches, trains, resumes, saves, reloads, samples."""

from pathlib import Path

import pytest
import tiny
import torch
from runs import Interrupted, arguments_of, rows, stop_at, train
from safetensors.torch import load_file

from longreel.data.decode import probe, read_clip
from longreel.launch.commands import main
from longreel.trainer.adapter import lora
from longreel.trainer.clips import extra_captions
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES
from longreel.trainer.job import Job
from longreel.trainer.memory import offload
from longreel.trainer.run.metrics import column, read_rows


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def arguments(name: str, videos: Path, cache: Path, tmp_path: Path) -> list[str]:
    return arguments_of(name, videos, cache, tmp_path / "run")


def test_resumed_equals_uninterrupted(name, arguments, cache, tmp_path, monkeypatch):
    """Bit for bit, in batches of different captions of which some are dropped; then the adapter
    goes through stock diffusers and `longreel sample`."""
    settings = ["train.batch=2", "train.caption_dropout=0.5", "lora.dropout=0.1", "lora.alpha=8"]
    whole = train(arguments, *settings, f"run.dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(arguments, *settings)
    resumed = train(arguments, *settings)
    one, two = (load_file(trainer.run_dir / lora.WEIGHTS) for trainer in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(tensor.any() for key, tensor in one.items() if "lora_B" in key)
    assert rows(whole.run_dir) == rows(resumed.run_dir)

    family = FAMILIES[name]
    inputs = tiny.make_inputs(family, frames=6, height=8, width=8)
    pipe = tiny.load_pipeline(family)
    pipe.load_lora_weights(resumed.run_dir)
    trained = resumed.learner.transformer.eval()
    resumed.learner.attention.dense_layers = frozenset(range(9))  # stock attention is dense
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**inputs).sample, trained(**inputs).sample)

    out = tmp_path / "sample.mp4"
    main(
        ["sample", f"lora={resumed.run_dir}", "prompt=waves", f"out={out}", "steps=2"]
        + [f"cache={cache}"]
    )
    info, frames = probe(out), resumed.job.frames
    assert (info.width, info.height, round(info.fps)) == (64, 64, family.defaults.fps)
    clip = read_clip(out, start=0, frames=frames, fps=family.defaults.fps, height=64, width=64)
    assert clip.std() > 1


def test_what_saves_memory_leaves_training_alone(arguments, tmp_path, monkeypatch):
    """Runs are equal to the bit where the operations are the same; a run may change these settings
    as it goes."""
    monkeypatch.setattr(offload, "PAGE", 1024)
    plain = train(arguments, "memory.recompute=none", f"run.dir={tmp_path / 'plain'}")
    saving = ["memory.recompute=all_but_attention", "memory.offload=true", "lora.dropout=0"]
    train(arguments, *saving, "train.steps=2")
    trainer = train(arguments, "memory.recompute=all", "lora.dropout=0")
    one, two = (load_file(run.run_dir / lora.WEIGHTS) for run in (plain, trainer))
    assert all(torch.equal(one[key], two[key]) for key in one)
    losses = [column(read_rows(run.run_dir / "metrics.csv"), "loss") for run in (plain, trainer)]
    assert losses[0] == losses[1]
    work = [
        list(column(read_rows(run.run_dir / "metrics.csv"), "attention_pflop").values())
        for run in (plain, trainer)
    ]
    # Attention's forward was recomputed in the last two steps alone.
    ratios = [with_it / without for without, with_it in zip(*work, strict=True)]
    assert ratios == pytest.approx([1, 1, 4.5 / 3.5, 4.5 / 3.5])


def test_offload_says_what_it_holds(arguments, monkeypatch, caplog):
    monkeypatch.setattr(offload, "PAGE", 1024)
    caplog.set_level("INFO")
    settings = ["memory.recompute=all_but_attention", "memory.offload=true", "memory.mlp_chunk=64"]
    trainer = train(arguments, *settings, "train.steps=2")
    assert trainer.learner.offload is not None and trainer.learner.offload.pool.size > 2**16
    assert len([m for m in caplog.messages if m.startswith("memory.offload now holds")]) == 1


def test_samples_within_a_run_leave_training_alone(arguments, tmp_path):
    plain = train(arguments, "validate.every=100", "train.steps=2", f"run.dir={tmp_path / 'a'}")
    watched = train(
        arguments,
        "validate.every=1",
        "train.steps=2",
        "validate.prompts=a wave",
        f"run.dir={tmp_path / 'b'}",
    )
    one, two = (load_file(trainer.run_dir / lora.WEIGHTS) for trainer in (plain, watched))
    assert all(torch.equal(one[key], two[key]) for key in one)
    samples = sorted(path.name for path in (tmp_path / "b/samples").iterdir())
    assert samples == ["step-000000-0.mp4", "step-000001-0.mp4", "step-000002-0.mp4"]


def test_what_is_logged_counts_the_caption_s_tokens(name, arguments, tmp_path):
    trainer = train(arguments, "train.steps=1")
    video = trainer.job.grid(trainer.job.frames).without_text()
    row = next(row for row in read_rows(trainer.run_dir / "metrics.csv") if row["loss"])
    geometry = trainer.job.geometry
    per_pair = 4 * geometry.heads * geometry.head_dim * geometry.layers * 4.5 / 1e15
    tokens = round((float(row["attention_dense_pflop"]) / per_pair) ** 0.5)
    text = tokens - len(video)
    assert text == 0 if name == "wan" else 1 < text <= FAMILIES[name].text.sequence_tokens


def test_the_empty_caption_is_cached_for_dropout_alone(arguments):
    config = load([*arguments, "train.caption_dropout=0.1"])
    assert extra_captions(config) == [""]
    assert extra_captions(load(arguments)) == []


def test_all_captions_dropped_is_as_if_there_were_none(arguments, videos, tmp_path):
    """Dropout of 1 trains on "" alone, which is what files with empty captions would give."""
    dropped = train(arguments, "train.caption_dropout=1", "train.steps=2").run_dir
    kept = train(arguments, "train.steps=2", f"run.dir={tmp_path / 'kept'}").run_dir
    losses = [column(read_rows(d / "metrics.csv"), "loss") for d in (dropped, kept)]
    assert losses[0].keys() == losses[1].keys() and losses[0] != losses[1]


def test_guidance_is_a_setting_of_models_that_are_told_it(name, arguments):
    job = Job.from_config(load(arguments))
    told = job.geometry.guidance_embeds
    assert told == (name == "hunyuan")
    assert job.config.train.guidance == (1.0 if told else None)
    assert job.config.validate.guidance == FAMILIES[name].defaults.guidance
    changed = load([*arguments, "train.guidance=3.5"])
    if told:
        job = Job.from_config(changed)
        assert job.config.train.guidance == job.adapter_entry()["guidance"] == 3.5
    else:
        with pytest.raises(ConfigError, match="train.guidance=3.5: this model takes no guidance"):
            Job.from_config(changed)


def test_modulation_is_fused_in_families_that_have_it(name, arguments):
    config = load([*arguments, "speed.fused_modulation=true"])
    if name != "hunyuan":
        assert Job.from_config(config).config.speed.fused_modulation
        return
    with pytest.raises(ConfigError, match="speed.fused_modulation=true: family=hunyuan has no"):
        Job.from_config(config)


@pytest.mark.slow
def test_the_tiny_recipe_lowers_the_heldout_loss(name, waves, cache, tmp_path):
    """It does as it ships, on moving waves, by at least a tenth at the target length."""
    run = [f"recipe=tiny_{name}", f"data.path={waves}", f"run.dir={tmp_path / 'run'}"]
    trainer = train(run, f"cache.dir={cache}", "log.wandb=false")
    heldout = list(column(trainer.metrics.rows(), "heldout_loss_target").values())
    assert heldout[-1] < 0.9 * heldout[0]
    assert trainer.setup.cost.layer_density < 0.7
