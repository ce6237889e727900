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
from longreel.trainer.loop import Trainer
from longreel.trainer.plan.estimate import GIB
from longreel.trainer.plan.estimate import MemoryUse as Predicted
from longreel.trainer.plan.trial_step import Taken, is_probed
from longreel.trainer.run import checkpoint
from longreel.trainer.step import Learner

PROBE = "memory.trial_step=true"
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
    for name, probe in (("with", PROBE), ("without", "memory.trial_step=false")):
        given = arguments_of(family, videos, cache, tmp_path / name)
        runs.append(train([*given, *EVERYTHING], probe).run_dir)
    assert_same_run(*runs)


def test_a_resumed_run_is_the_same_with_it(arguments, tmp_path, monkeypatch):
    whole = train(arguments, *EVERYTHING, f"run.dir={tmp_path / 'whole'}").run_dir
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(arguments, *EVERYTHING, PROBE)
    assert_same_run(train(arguments, *EVERYTHING, PROBE).run_dir, whole)


def state_of(trainer: Trainer) -> list:
    optimizer = trainer.learner.optimizer
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if trainer.learner.device.type == "cuda" else None,
        [p.detach().clone() for p in trainer.learner.parameters.values()],
        [p.grad for p in trainer.learner.parameters.values()],
        copy.deepcopy(optimizer.state_dict()),
        len(optimizer.state),
        trainer.learner.attention.current,
        [module.training for module in trainer.learner.transformer.modules()],
    ]


def watch(monkeypatch, during=lambda trainer: None):
    """Runs with a look at the trainer before the step, in its forward, and after it."""
    seen = []
    probe, loss_at = Trainer._probe_step, Learner.loss_at

    def probed(self):
        trainer = self
        seen.append(state_of(trainer))

        def watched(*args):
            loss = loss_at(*args)
            seen.append(during(trainer))
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "loss_at", watched)
            probe(self)
        trainer = self
        seen.append(state_of(trainer))

    monkeypatch.setattr(Trainer, "_probe_step", probed)
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
    """Of a new run, and of one that goes on and has moments."""
    seen = watch(monkeypatch)
    train(arguments, PROBE, "lora.dropout=0.1", "train.steps=2")
    train(arguments, PROBE, "lora.dropout=0.1", "train.steps=3")
    new, _, new_after, resumed, _, resumed_after = seen
    assert same(new, new_after) and new[5] == 0
    assert same(resumed, resumed_after) and resumed[5] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_it_leaves_no_trace_on_a_gpu(family, videos, cache, tmp_path, monkeypatch, capsys):
    """By default, dropout and offload included."""
    seen = watch(monkeypatch)
    given = arguments_of(family, videos, cache, tmp_path / "run")
    train(given, *EVERYTHING, "memory.base_dtype=bfloat16", "train.steps=2")
    before, _, after = seen
    assert before[1] is not None and same(before, after)
    assert "GiB of the GPU allocated at most" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_step_of_the_longest_shape(family, videos, cache, tmp_path, monkeypatch):
    """With the moments held, and the gradients of batches before."""

    def during(trainer):
        state = trainer.learner.optimizer.state
        held = [
            (set(state[p]), p.grad is not None and p.grad.shape == p.shape)
            for p in trainer.learner.parameters.values()
        ]
        return trainer.learner.attention.current, held

    seen = watch(monkeypatch, during)
    given = [*arguments_of(family, videos, cache, tmp_path / "run"), PROBE, "train.batch=2"]
    for accumulate in (1, 2):
        trainer = train(
            given, f"train.gradient_accumulation={accumulate}", f"run.dir={tmp_path}/{accumulate}"
        )
        plan, held = seen.pop(-2)
        assert plan.grid == trainer.learner.grid
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
            train(arguments, PROBE, "memory.recompute=none")
    assert str(caught.value).splitlines() == [
        "error: out of memory in the step tried before the run: CUDA out of memory. Tried to "
        "allocate 85.00 GiB.",
        "No step is saved yet: the same command begins the run again.",
        "What to change, what costs least first: memory.recompute=all_but_attention; then "
        "memory.recompute=all.",
    ]
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "mask.png"]
    train(arguments, PROBE, "train.steps=2")  # the run begins, with other settings

    kept = [run_dir / "metrics.csv", *sorted((run_dir / "checkpoints").rglob("*.*"))]
    before = [path.read_bytes() for path in kept if path.is_file()]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss_at", no_room)
        with pytest.raises(SystemExit, match="Step 2 is saved in .*: the same command goes on"):
            train(arguments, PROBE)
    assert [path.read_bytes() for path in kept if path.is_file()] == before
    train(arguments, PROBE)
    assert checkpoint.latest(run_dir / "checkpoints").name == "step-000004"


def test_what_it_took_is_told(arguments, capsys):
    train(arguments, PROBE, "train.steps=1")
    told = " ".join(capsys.readouterr().out.split())
    assert "A step was tried, and fits: 0." in told
    train(arguments, PROBE, "train.steps=1")  # complete
    assert "was tried" not in capsys.readouterr().out


def test_a_gpu_s_figures_stand_beside_the_prediction():
    predicted = Predicted({"frozen base": 20 * GIB, "reserve": 2.5 * GIB}, {"offload": 7 * GIB})
    assert str(Taken(12.34, 19.5 * GIB, 21 * GIB, 8 * GIB, predicted)) == (
        "12.3 s, with what a first one compiles; 19.5 GiB of the GPU allocated at most (predicted "
        "20.0); 21.0 GiB reserved (predicted 22.5, with CUDA's own); 8.0 GiB of host memory by "
        "memory.offload (predicted 7.0)"
    )


def test_by_default_a_gpu_tries_and_a_cpu_does_not():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [is_probed(Memory(), device) for device in (cpu, gpu)] == [False, True]
    assert [is_probed(Memory(trial_step=on), cpu) for on in (True, False)] == [True, False]
