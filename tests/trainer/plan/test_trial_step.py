"""The step that is tried before a run: it is a whole one, and it leaves nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from runs import Interrupted, arguments_of, rows, stop_at, train
from safetensors.torch import load_file

from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Memory
from longreel.trainer.families import FAMILIES
from longreel.trainer.plan.estimate import GIB
from longreel.trainer.plan.estimate import MemoryUse as Predicted
from longreel.trainer.plan.trial_step import TrialStep, wants_trial_step
from longreel.trainer.run import checkpoint
from longreel.trainer.step import Learner

TRIAL = "memory.trial_step=true"
EVERYTHING = [
    "lora.dropout=0.1",
    "train.gradient_accumulation=2",
    "train.batch=2",
    "train.schedule=cosine",
    "train.caption_dropout=0.5",
    "memory.offload=true",
    "memory.mlp_chunk=64",
    "validate.every=1",
]


def assert_same_run(one: Path, two: Path) -> None:
    assert rows(one) == rows(two)
    for name in (lora.WEIGHTS, "checkpoints/step-000004/state.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "family", ["wan", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "wan")]
)
def test_a_run_is_the_same_with_it(family, videos, cache, tmp_path):
    """Bit for bit, in losses, adapter and moments."""
    runs = []
    for name, trial in (("with", TRIAL), ("without", "memory.trial_step=false")):
        given = arguments_of(family, videos, cache, tmp_path / name)
        runs.append(train([*given, *EVERYTHING], trial).run_dir)
    assert_same_run(*runs)


def test_a_resumed_run_is_the_same_with_it(arguments, tmp_path, monkeypatch):
    whole = train(arguments, *EVERYTHING, f"run.dir={tmp_path / 'whole'}").run_dir
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(arguments, *EVERYTHING, TRIAL)
    assert_same_run(train(arguments, *EVERYTHING, TRIAL).run_dir, whole)


def state_of(learner: Learner) -> list:
    optimizer = learner.optimizer
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if learner.device.type == "cuda" else None,
        [p.detach().clone() for p in learner.parameters.values()],
        [p.grad for p in learner.parameters.values()],
        copy.deepcopy(optimizer.state_dict()),
        len(optimizer.state),
        learner.attention.current,
        [module.training for module in learner.transformer.modules()],
    ]


def watch(monkeypatch, during=lambda learner: None):
    """Record the learner's state before each run's trial step, in its forward, and after it."""
    seen = []
    trial_step, loss_at = Learner.trial_step, Learner.loss_at

    def recorded(learner, text):
        seen.append(state_of(learner))

        def watched(*args):
            loss = loss_at(*args)
            seen.append(during(learner))
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "loss_at", watched)
            found = trial_step(learner, text)
        seen.append(state_of(learner))
        return found

    monkeypatch.setattr(Learner, "trial_step", recorded)
    return seen


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_it_leaves_no_trace(arguments, monkeypatch):
    """A new run is as it was, and so is one that goes on and has moments."""
    seen = watch(monkeypatch)
    train(arguments, TRIAL, "lora.dropout=0.1", "train.steps=2")
    train(arguments, TRIAL, "lora.dropout=0.1", "train.steps=3")
    new, _, new_after, resumed, _, resumed_after = seen
    assert same(new, new_after) and new[5] == 0
    assert same(resumed, resumed_after) and resumed[5] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_it_leaves_no_trace_on_a_gpu(family, videos, cache, tmp_path, monkeypatch, capsys):
    """It is tried by default, dropout and offload included."""
    seen = watch(monkeypatch)
    given = arguments_of(family, videos, cache, tmp_path / "run")
    train(given, *EVERYTHING, "memory.base_dtype=bfloat16", "train.steps=2")
    before, _, after = seen
    assert before[1] is not None and same(before, after)
    assert "GiB of the GPU allocated at the peak" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_step_of_the_longest_shape(family, videos, cache, tmp_path, monkeypatch):
    """The moments are held then, and the gradients of batches before."""

    def during(learner):
        state = learner.optimizer.state
        held = [
            (set(state[p]), p.grad is not None and p.grad.shape == p.shape)
            for p in learner.parameters.values()
        ]
        return learner.attention.current, held

    seen = watch(monkeypatch, during)
    given = [*arguments_of(family, videos, cache, tmp_path / "run"), TRIAL, "train.batch=2"]
    for accumulate in (1, 2):
        trainer = train(
            given, f"train.gradient_accumulation={accumulate}", f"run.dir={tmp_path}/{accumulate}"
        )
        plan, held = seen.pop(-2)
        assert plan.grid == trainer.setup.grid
        if trainer.job.family.text.sequence_tokens:  # captions of a batch differ in length
            assert plan.valid == (len(plan.grid), len(plan.grid) - 1)
        moments = {"step", "exp_avg", "exp_avg_sq"}
        assert held == [(moments, accumulate > 1)] * len(trainer.learner.parameters)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_run_that_does_not_fit_ends_before_it_began(arguments, tmp_path, monkeypatch, kind):
    def no_room(*_):
        raise kind("CUDA out of memory. Tried to allocate 85.00 GiB.\nmore")

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss_at", no_room)
        with pytest.raises(SystemExit) as caught:
            train(arguments, TRIAL, "memory.recompute=none")
    assert str(caught.value).splitlines() == [
        "error: out of memory in the trial step before the run: CUDA out of memory. Tried to "
        "allocate 85.00 GiB.",
        "No step is saved yet: the same command starts the run again.",
        "Remedies, the cheapest first: memory.recompute=all_but_attention; then "
        "memory.recompute=all.",
    ]
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "mask.png"]
    train(arguments, TRIAL, "train.steps=2")  # the run begins, with other settings

    kept = [run_dir / "metrics.csv", *sorted((run_dir / "checkpoints").rglob("*.*"))]
    before = [path.read_bytes() for path in kept if path.is_file()]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss_at", no_room)
        with pytest.raises(SystemExit, match="Step 2 is saved in .*: the same command continues"):
            train(arguments, TRIAL)
    assert [path.read_bytes() for path in kept if path.is_file()] == before
    train(arguments, TRIAL)
    assert checkpoint.latest(run_dir / "checkpoints").name == "step-000004"


def test_what_it_took_is_told(arguments, capsys):
    train(arguments, TRIAL, "train.steps=1")
    told = " ".join(capsys.readouterr().out.split())
    assert "The trial step fits: 0." in told
    train(arguments, TRIAL, "train.steps=1")  # complete
    assert "trial step" not in capsys.readouterr().out


def test_a_gpu_s_figures_stand_beside_the_prediction():
    predicted = Predicted({"frozen base": 20 * GIB, "reserve": 2.5 * GIB}, {"offload": 7 * GIB})
    assert str(TrialStep(12.34, 19.5 * GIB, 21 * GIB, 8 * GIB, predicted)) == (
        "12.3 s, compilation included; 19.5 GiB of the GPU allocated at the peak (predicted 20.0); "
        "21.0 GiB reserved (predicted 22.5, CUDA's context included); 8.0 GiB of host memory by "
        "memory.offload (predicted 7.0)"
    )


def test_by_default_a_gpu_tries_and_a_cpu_does_not():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [wants_trial_step(Memory(), device) for device in (cpu, gpu)] == [False, True]
    assert [wants_trial_step(Memory(trial_step=on), cpu) for on in (True, False)] == [True, False]
