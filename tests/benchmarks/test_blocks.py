"""Few blocks, and the published depth from them."""

import pytest
from lib.blocks import Design, count_blocks, describe, with_blocks

from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.plan import rates
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.predict import plan

KINDS = {
    "hunyuan_2x": {"dual dense": 2, "dual sparse": 18, "single sparse": 40},
    "hunyuan_2x sparse.pattern.name=dense": {"dual dense": 20, "single dense": 40},
    "hunyuan_2x sparse.dense_layers=[0,-1]": {
        "dual dense": 1,
        "dual sparse": 19,
        "single sparse": 39,
        "single dense": 1,
    },
    "mochi_4x": {"dual dense": 2, "dual sparse": 46},
    "wan_14b_2x": {"block dense": 2, "block sparse": 38},
}


def job_of(arguments):
    return Job.from_config(load(f"recipe={arguments}".split()), published=True)


def test_a_linear_cost_is_found_exactly():
    whole = {"dual dense": 2, "dual sparse": 18, "single sparse": 40}
    costs = {"dual dense": 5.5, "dual sparse": 1.5, "single sparse": 1.25}
    for low, high in ((1, 2), (1, 3), (2, 4)):
        design = Design(whole, low, high)
        values = [7 + sum(costs[kind] * n for kind, n in x.items()) for x in design.points]
        assert len(values) == 4
        assert design.per_block(values) == costs
        assert design.total(values) == 7 + 2 * 5.5 + 18 * 1.5 + 40 * 1.25


def test_a_whole_model_is_not_extrapolated():
    design = Design({"block sparse": 30}, 0, 0)
    assert design.points == [{"block sparse": 30}]
    assert design.total([5.0]) == 5.0 and design.per_block([5.0]) == {}


QUICK = "hunyuan_2x sparse.dense_layers=[0,-1]", "wan_14b_2x"


@pytest.mark.parametrize(
    "arguments", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_published_models_from_few_blocks(arguments):
    """Parameters, operations and predicted seconds of the whole model, from one to two blocks of
    each kind: first and last layers, and Mochi's last block, count once."""
    job = job_of(arguments)
    whole = count_blocks(job)
    assert whole == KINDS[arguments]
    design = Design(whole, 1, 2)
    few = [with_blocks(job, counts) for counts in design.points]
    for one, counts in zip(few, design.points, strict=True):
        assert count_blocks(one) == counts and sum(counts.values()) == one.geometry.layers
    made = plan(job, rates.MEASURED)
    plans = [plan(one, rates.MEASURED) for one in few]
    assert design.total([anatomy(one).params for one in few]) == anatomy(job).params
    assert design.total([p.model.lora for p in plans]) == made.model.lora
    assert design.total([p.flops.total for p in plans]) == pytest.approx(made.flops.total)
    assert design.total([p.seconds.attention for p in plans]) == pytest.approx(
        made.seconds.attention
    )


def test_a_solved_pattern_is_kept(tmp_path):
    job = job_of(f"tiny_wan sparse.density=0.3 cache.dir={tmp_path}")
    few = with_blocks(job, {"block dense": 1, "block sparse": 1})
    assert few.pattern == job.pattern and few.config.sparse.density is None


def test_words():
    assert describe({"dual dense": 2, "single sparse": 40}) == "2 dual dense, 40 single sparse"
