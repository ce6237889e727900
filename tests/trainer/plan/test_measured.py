"""Predictions against measured peaks and seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import H200, job_of

from longreel.trainer.plan import predict, rates
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import GIB, Knobs, training_memory


# GiB that torch allocated at most, H200, 2026-11-22: tests/trainer/families/test_full_width.py with
# the first and the last block, and wan_1_3b_2x whole (test_gpu_run.py, with all its blocks then).
@pytest.mark.parametrize("recipe, blocks, peak", [
    ("wan_14b_2x", (0, -1), 55.7),
    ("hunyuan_2x", (0, -1), 50),
    ("mochi_2x", (0, -1), 26),
    ("wan_1_3b_2x", range(30), 16.6),
])  # fmt: skip
def test_peaks_are_those_measured(recipe, blocks, peak):
    job = job_of(recipe)
    model = anatomy(job)
    chosen = tuple(model.blocks[i] for i in blocks)
    left_out = sum(b.params for b in model.blocks) - sum(b.params for b in chosen)
    model = replace(
        model, blocks=chosen, params=model.params - left_out, lora=sum(b.lora for b in chosen)
    )
    tokens = job.grid(job.frames).video + (100 if job.family.text.sequence_tokens else 0)
    predicted = training_memory(model, tokens, Knobs()).peak / GIB - rates.RESERVE
    assert predicted == pytest.approx(peak, rel=rates.MEMORY_ERROR)


FASTEST = ["memory.recompute=all_but_attention", "memory.offload_keep=20"]
FASTEST += ["lora.compute_dtype=bfloat16", "speed.fused_norms=true"]


# benchmarks/results/2026-11-23-training-h200.md: GiB allocated and pinned, and seconds.
@pytest.mark.parametrize("recipe, settings, peak, pinned, seconds", [
    ("hunyuan_2x", [], 74.2, 79, 109.3),
    ("hunyuan_2x", FASTEST, 113.7, 108, 75.1),
    ("mochi_4x", [], 117.7, 0, 57.7),
    ("wan_14b_2x", [], 83.4, 56, 74.9),
    ("wan_14b_4x", [], 135.6, 109, 183.1),
])  # fmt: skip
def test_whole_steps_are_what_was_measured(recipe, settings, peak, pinned, seconds):
    made = predict.plan(job_of(recipe, "train.gradient_accumulation=1", *settings), H200)
    assert made.memory.peak / GIB - rates.RESERVE == pytest.approx(peak, rel=0.04)
    assert made.memory.host.get("offload", 0) / GIB == pytest.approx(pinned, rel=0.03)
    assert made.seconds.total == pytest.approx(seconds, rel=0.09)


def test_seconds_are_those_measured():
    """The run that the constant of element-wise work comes from: its header says 5.0 s."""
    assert predict.plan(job_of("wan_1_3b_2x"), H200).seconds.total == pytest.approx(5.0, abs=0.1)
