"""Test what a run is predicted to take: its length and tokens, the longest that fits, GPUs, the
cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import H200, job_of

from longreel.launch.commands import main
from longreel.trainer.config.recipe import recipe_names
from longreel.trainer.config.values import ConfigError
from longreel.trainer.plan import predict, sampling
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import GIB, Knobs, training_memory

# What each recipe trains on: latent grid, text, and the kept share of pairs of a sparse layer.
SIZES = {
    "hunyuan_2x": ((64, 45, 80, 256), 0.1935),
    "hunyuan_4x": ((128, 45, 80, 256), 0.1173),
    "mochi_2x": ((56, 30, 53, 256), 0.2395),
    "mochi_4x": ((112, 30, 53, 256), 0.1456),
    "tiny_hunyuan": ((20, 10, 12, 256), 0.5413),
    "tiny_mochi": ((18, 10, 12, 256), 0.5804),
    "tiny_wan": ((49, 10, 12, 0), 0.2540),
    "wan_14b_2x": ((41, 45, 80, 0), 0.2601),
    "wan_14b_4x": ((81, 45, 80, 0), 0.1624),
    "wan_1_3b_2x": ((41, 30, 52, 0), 0.2980),
    "wan_1_3b_4x": ((81, 30, 52, 0), 0.1860),
}


@pytest.mark.parametrize("recipe", recipe_names())
def test_tokens_and_densities_of_the_recipes(recipe, tmp_path):
    made = predict.plan(job_of(recipe, cache=tmp_path), H200)
    (frames, height, width, text), density = SIZES[recipe]
    grid = made.grid
    assert (grid.frames, grid.height, grid.width, grid.text) == (frames, height, width, text)
    dense = 1 if recipe.startswith("tiny") else 2
    sparse = [pytest.approx(density, abs=5.1e-5)] * (len(made.densities) - dense)
    assert made.densities == [1.0] * dense + sparse


def test_the_verdict_knows_the_error_of_the_prediction():
    made = predict.plan(job_of("wan_14b_2x"), H200)
    verdicts = [replace(made, memory_limit=f * made.memory.peak).verdict for f in (0.99, 1.05, 1.1)]
    assert verdicts == ["does not fit", "may fit, by less than 8%", "fits"]


def test_gpus_share_the_samples_and_split_the_hours():
    one, eight = (predict.plan(job_of("wan_14b_2x"), H200, gpus=n) for n in (1, 8))
    assert (one.samples, eight.samples) == (8, 64)
    assert eight.seconds == one.seconds and eight.gpu_hours == pytest.approx(8 * one.gpu_hours)


def test_gpus_that_share_a_sample():
    alone, shared = (
        predict.plan(job_of("wan_14b_2x", *settings), H200, gpus=8)
        for settings in ([], ["parallel.sequence=4"])
    )
    assert (alone.samples, shared.samples) == (64, 16)
    assert shared.exchanged > 0 == alone.exchanged == alone.seconds.exchange
    assert shared.seconds.attention == pytest.approx(alone.seconds.attention / 4)
    assert shared.memory.fixed == alone.memory.fixed
    assert shared.memory.gpu["block inputs"] == pytest.approx(alone.memory.gpu["block inputs"] / 4)
    # As many GPUs as share a sample, if not told; sampling is on one all the same.
    made = predict.plan(job_of("wan_14b_2x", "parallel.sequence=5"), H200)
    assert (made.gpus, made.samples) == (5, 8)
    samples = [
        sampling.plan_sampling(job_of("wan_14b_2x", *settings), H200)
        for settings in ([], ["parallel.sequence=5"])
    ]
    assert samples[0] == samples[1]
    with pytest.raises(ConfigError, match=r"40 heads and the number of processes, 6; .*: 1, 2\.$"):
        predict.plan(job_of("wan_14b_2x", "parallel.sequence=4"), H200, gpus=6)


@pytest.mark.parametrize(("engine", "saved"), [("zero2", 0.9), ("zero3", 20.9), ("fsdp2", 21.0)])
def test_engines_shard_what_they_say(engine, saved, capsys):
    """GiB of one GPU of eight, of HunyuanVideo's 23.9 of weights and 2.3 of the adapter."""
    settings = ["parallel.sequence=8", "gpus=8"]
    of = [
        predict.plan(job_of("hunyuan_4x", "parallel.sequence=8", *more), H200, gpus=8).memory.peak
        for more in ((), (f"parallel.engine={engine}",))
    ]
    assert (of[0] - of[1]) / 2**30 == pytest.approx(saved, abs=0.3)
    main(["plan", "recipe=hunyuan_4x", *settings, f"parallel.engine={engine}"])
    said = " ".join(capsys.readouterr().out.split())
    told = "which a LoRA has few of" if engine == "zero2" else "1/8 of the frozen base on each GPU"
    assert told in said


@pytest.mark.parametrize("recipe, gib", [
    ("wan_1_3b_2x", 24), ("mochi_2x", 80), ("hunyuan_2x", 140), ("wan_14b_2x", 80),
])  # fmt: skip
def test_the_longest_length_is_that_of_a_search_through_all(recipe, gib):
    job = job_of(recipe)
    model, step = anatomy(job), job.geometry.frame_step
    fitting = [
        frames
        for frames in range(1, 2001, step)
        if training_memory(model, len(job.grid(frames)), Knobs()).peak <= gib * GIB
    ]
    assert 1 < fitting[-1] < 1900
    assert predict.longest_training(job, model, gib * GIB, Knobs()) == fitting[-1]
    job.geometry.check_frames(fitting[-1])


def test_the_longest_length_ends_with_the_positions():
    job = job_of("wan_1_3b_2x")
    assert predict.longest_frames(job, lambda tokens: True) == 4 * 1023 + 1
    assert predict.longest_frames(job, lambda tokens: False) is None


def test_cache_sizes_are_those_of_the_latents():
    made = predict.plan(job_of("hunyuan_2x"), H200)
    assert made.clip_bytes == 2 * 16 * 64 * 90 * 160 and made.caption_bytes == 2 * 256 * 4096
