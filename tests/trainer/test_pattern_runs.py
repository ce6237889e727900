"""Every pattern through a whole run: trains, saves, reloads and samples as it trained."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from runs import rows, train
from tiny import WAN

from longreel.launch.commands import main
from longreel.sparse.patterns import PATTERNS, pattern_name
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import pattern_from_dict
from longreel.trainer.families import installed_attention
from longreel.trainer.run.metrics import column
from longreel.trainer.sampling import pipeline

# What makes a pattern sparse on 17 frames of 6 x 6 tokens in blocks of 16, for two heads.
SPARSE = {
    "dense": [],
    "radial": [],
    "harmonic": [],
    "spatial": ["half_width=2"],
    "temporal": ["half_width=2"],
    "spatial_temporal": ["half_width=2"],
    "power": ["window=1"],
    "longlora": [],
    "sliding_tile": ["tile=4x2x2", "windows=3x1x1 3x3x1"],
    "cube": ["cube=2x2x4"],
}
HEAD_LAYOUTS = dict.fromkeys(("spatial_temporal", "longlora", "sliding_tile"), [0, 1])


@pytest.fixture
def sampled(cache, tmp_path, monkeypatch):
    """`longreel sample` as (pipeline, frames): an mp4 would not give the frames back."""

    def sample(run_dir: Path, *options: str):
        pipes, frames, real = [], [], pipeline.load_pipeline

        def load_pipeline(*args, **kwargs):
            pipes.append(real(*args, **kwargs))
            return pipes[-1]

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "load_pipeline", load_pipeline)
            patch.setattr(
                "longreel.data.write_video.write_video",
                lambda path, video, fps: frames.extend(video),
            )
            given = [f"lora={run_dir}", "prompt=waves", "steps=3", f"out={tmp_path / 'a.mp4'}"]
            main(["sample", *given, f"cache={cache}", "device=cpu", *options])
        return pipes[0], np.stack(frames)

    return sample


def video_of(trainer):
    """Return what the transformer in training samples, as `sampled` does from its adapter."""
    pipe = tiny.load_pipeline(WAN, trainer.learner.transformer)
    size = {"frames": trainer.job.frames, "height": 96, "width": 96}
    return np.stack(list(pipeline.generate(pipe, prompt="waves", steps=3, seed=0, **size)))


def test_every_pattern_has_its_run():
    assert set(SPARSE) == set(PATTERNS)


# Those of one layout for all heads differ from radial in their lists alone.
LIKE_RADIAL = ("harmonic", "spatial", "temporal", "power", "cube")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LIKE_RADIAL else name
        for name in SPARSE
    ],
)
def test_a_pattern_trains_and_samples_from_its_adapter(name, arguments, sampled):
    parameters = [f"sparse.pattern.{parameter}" for parameter in SPARSE[name]]
    size = ["height=96", "width=96", "train.lr=0.05"]  # so that four steps show
    trainer = train(arguments, f"sparse.pattern.name={name}", *parameters, *size)
    weights = [p.abs().max() for key, p in trainer.learner.parameters.items() if "lora_B" in key]
    assert min(weights) > 0.01
    pipe, frames = sampled(trainer.run_dir)
    attention = installed_attention(pipe.transformer)
    assert pattern_name(attention.pattern) == name
    assert (
        attention.pattern == trainer.job.config.sparse.pattern == trainer.learner.attention.pattern
    )
    assert list(attention.pattern.head_layouts(2)) == HEAD_LAYOUTS.get(name, [0, 0])
    assert np.array_equal(frames, video_of(trainer))
    if name != "dense":
        assert trainer.setup.cost.layer_density < 0.85
        assert not np.array_equal(frames, sampled(trainer.run_dir, "dense=true")[1])


def test_a_density_sets_the_width_that_is_trained_recorded_and_sampled(
    arguments, sampled, caplog, tmp_path
):
    """The config keeps the request, the adapter what it came to."""
    wanted = ["sparse.pattern.name=spatial_temporal", "sparse.density=0.4"]
    with caplog.at_level("INFO"):
        trainer = train(arguments, *wanted, "sparse.dense_layers=[-1]", "sparse.dense_steps=[0,-1]")
    pattern = trainer.learner.attention.pattern
    assert pattern == trainer.job.pattern != trainer.job.config.sparse.pattern
    assert trainer.setup.cost.layer_density == pytest.approx(0.4, abs=0.02)  # 17 blocks are coarse
    achieved, width = trainer.setup.cost.layer_density, pattern.half_width
    assert f"half_width={width} (wanted 0.4, achieved {achieved:.4f})." in caplog.text
    share = f"{achieved:.1%} in 0-1, 100.0% in 2"
    mean = (1 + 2 * achieved) / 3
    assert f"Attention computes {mean:.1%} of all pairs over 3 layers: {share}." in caplog.text
    logged = [float(row["attention_density"]) for row in rows(trainer.run_dir) if row["loss"]]
    assert logged == pytest.approx([mean] * 4)

    entry = lora.read_entry(trainer.run_dir)
    assert pattern_from_dict(entry["pattern"]) == pattern
    assert (entry["dense_layers"], entry["dense_steps"]) == ([2], [-1, 0])
    attention = installed_attention(sampled(trainer.run_dir)[0].transformer)
    assert attention.pattern == pattern and attention.dense_layers == [2]
    assert attention.dense_steps == [-1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_the_tiny_recipe_lowers_the_heldout_loss_under_a_pattern(name, waves, cache, tmp_path):
    """It does as it ships, by at least a tenth at the target length."""
    run = ["recipe=tiny_wan", f"data.path={waves}", f"run.dir={tmp_path / 'run'}"]
    pattern = f"sparse.pattern.name={name}"
    trainer = train(run, pattern, f"cache.dir={cache}", "log.wandb=false")
    heldout = list(column(trainer.metrics.rows(), "heldout_loss_target").values())
    density = trainer.setup.cost.layer_density
    print(f"{name}: {heldout[0]:.4f} -> {heldout[-1]:.4f}, density {density:.3f}")
    assert heldout[-1] < 0.9 * heldout[0]
    assert density == 1 if name == "dense" else density < 0.4
