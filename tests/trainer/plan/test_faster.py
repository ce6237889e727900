"""Test what would make a run faster: each setting helps, all go together, and the run still
fits."""

from __future__ import annotations

import pytest

from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.plan import rates
from longreel.trainer.plan.faster import Faster, faster
from longreel.trainer.plan.predict import ResourcePlan, fits_surely, plan


def predicted(
    recipe: str, *settings: str, memory: float | None = None
) -> tuple[ResourcePlan, Faster | None]:
    job = Job.from_config(load([f"recipe={recipe}", *settings]), published=True)
    made = plan(job, rates.GPUS["h200"], memory=memory)
    return made, faster(job, made, rates.GPUS["h200"])


@pytest.mark.parametrize("recipe", ["mochi_2x", "mochi_4x"])
def test_the_plan_with_these_settings_agrees(recipe):
    was, found = predicted(recipe, "speed.fused_norms=false", "lora.compute_dtype=float32")
    assert found is not None
    assert {"speed.fused_norms=true", "lora.compute_dtype=bfloat16"} < set(found.settings)
    assert "memory.recompute=all_but_attention" in found.settings
    now, more = predicted(recipe, *found.settings)
    assert now.seconds.total == pytest.approx(found.seconds) and found.seconds < was.seconds.total
    assert now.memory == found.memory and fits_surely(now.memory, now.memory_limit)
    assert now.memory.host_peak <= max(was.memory.host_peak, was.memory_limit)
    assert more is None


def test_blocks_are_offloaded_where_their_attention_would_not_fit():
    _, found = predicted("mochi_4x")
    assert found is not None
    assert {"memory.recompute=all_but_attention", "memory.offload=true"} < set(found.settings)


def test_a_run_that_does_not_fit_may_be_faster_and_fit():
    wide = "speed.fused_norms=false", "lora.compute_dtype=float32"
    was, found = predicted("mochi_4x", *wide, memory=120)
    assert not was.fits and found is not None
    assert fits_surely(found.memory, was.memory_limit) and found.seconds < was.seconds.total


def test_settings_that_do_not_go_with_the_config_are_left_out():
    _, found = predicted("wan_1_3b_2x", "lora.compute_dtype=float32", "memory.base_dtype=float32")
    assert found is None or not any("compute_dtype" in setting for setting in found.settings)
    _, found = predicted("wan_1_3b_2x", "sparse.backend=flex")
    assert found is None or not any("checkpoint" in setting for setting in found.settings)
