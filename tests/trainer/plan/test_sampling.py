"""Test what a sample video is predicted to take."""

from __future__ import annotations

from plans import H200, job_of

from longreel.trainer.plan.predict import plan
from longreel.trainer.plan.sampling import plan_sampling


def test_sampling(tmp_path):
    """Guidance is two forwards for Wan, one of two samples for Mochi, none for HunyuanVideo."""
    made = {
        name: plan_sampling(job_of(f"{recipe}_2x"), H200)
        for name, recipe in (("wan", "wan_1_3b"), ("mochi", "mochi"), ("hunyuan", "hunyuan"))
    }
    assert [(p.steps, p.forwards, p.samples) for p in made.values()] == [
        (50, 100, 1), (64, 64, 2), (50, 50, 1)
    ]  # fmt: skip
    job = job_of("wan_1_3b_2x")
    training = plan(job, H200)
    assert made["wan"].peak < training.memory.peak
    dense = plan_sampling(job_of("wan_1_3b_2x", "sparse.pattern.name=dense"), H200)
    assert dense.seconds.attention > 2 * made["wan"].seconds.attention
