"""AdamW in fp32 and in 8 bits: the same checkpoints, and exact to resume."""

import json

import pytest
import torch
from runs import Interrupted, rows, stop_at, train
from safetensors.torch import load_file
from torch import nn

from longreel.trainer import optimizer
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.optimizer import (
    build_optimizer,
    check_installed,
    lr_factor,
    moments_allocated,
    moments_of,
)
from longreel.trainer.run import checkpoint
from longreel.trainer.run.checkpoint import Progress

MOMENTS = {
    "adamw": ["exp_avg", "exp_avg_sq"],
    "adamw8bit": ["absmax1", "absmax2", "state1", "state2"],
}


@pytest.fixture(params=MOMENTS)
def name(request):
    if request.param == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="the extra longreel[bitsandbytes]")
    return request.param


def parameters() -> dict[str, nn.Parameter]:
    """One that 8 bits are for, and a small one that stays in fp32."""
    torch.manual_seed(0)
    shapes = {"wide.lora_A": (64, 100), "small.lora_B": (8, 4)}
    return {key: nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}


def update(optimizer, own: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in own.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def test_moments_are_held_for_a_while(name):
    """They are there where none were yet; an update after it is the one that would have been
    made."""
    held, plain = parameters(), parameters()
    first, second = (build_optimizer(name, own.values(), 1e-2, 0.1) for own in (held, plain))
    with moments_allocated(first, held.values()):
        for parameter in held.values():
            updates, moments = moments_of(first, parameter) or (None, {})
            assert updates == 0 and len(moments) >= 2
    assert not first.state
    update(first, held, range(2))
    update(second, plain, range(2))
    with moments_allocated(first, held.values()):
        pass
    assert all(moments_of(first, parameter) is not None for parameter in held.values())
    assert all(torch.equal(held[key], plain[key]) for key in plain)


def test_moments_are_saved_and_restored_exactly(name, tmp_path):
    whole, stopped, resumed = parameters(), parameters(), parameters()
    update(build_optimizer(name, whole.values(), 1e-2, 0.1), whole, range(6))
    first = build_optimizer(name, stopped.values(), 1e-2, 0.1)
    update(first, stopped, range(3))
    folder = checkpoint.save(
        tmp_path, checkpoint.gather(stopped, first), Progress(3, 1, "", [3]), keep_last=1
    )
    kinds = {key.partition(".")[0] for key in load_file(folder / "state.safetensors")}
    small = {"state1", "state2"} if name == "adamw8bit" else set()
    assert kinds == {"lora", *MOMENTS[name]} | small
    assert json.loads((folder / "state.json").read_text())["adam_steps"] == dict.fromkeys(whole, 3)
    second = build_optimizer(name, resumed.values(), 1e-2, 0.1)
    checkpoint.scatter(checkpoint.load(folder, resumed), resumed, second)
    update(second, resumed, range(3, 6))
    for key, parameter in whole.items():
        assert torch.equal(resumed[key], parameter)
    if name == "adamw8bit":
        state = second.state[resumed["wide.lora_A"]]
        assert state["state1"].dtype == torch.uint8 and "qmap1" in state
        # What the 8 bits are for, and what they cost.
        plain = parameters()
        update(build_optimizer("adamw", plain.values(), 1e-2, 0.1), plain, range(6))
        moved = {key: (plain[key] - parameters()[key]).detach() for key in plain}
        for key, parameter in whole.items():
            error = (parameter - plain[key]).norm() / moved[key].norm()
            assert error < (0.05 if key == "wide.lora_A" else 1e-5)


def test_moments_of_another_optimizer_are_refused(name, tmp_path):
    own = parameters()
    first = build_optimizer(name, own.values(), 1e-2, 0.0)
    update(first, own, range(1))
    folder = checkpoint.save(
        tmp_path, checkpoint.gather(own, first), Progress(1, 1, "", [1]), keep_last=1
    )
    content = load_file(folder / "state.safetensors")
    renamed = {key.replace(MOMENTS[name][0], "another"): x for key, x in content.items()}
    checkpoint.save_file(renamed, folder / "state.safetensors")
    state = checkpoint.load(folder, own)
    with pytest.raises(ValueError, match=r"it holds \['a"):
        checkpoint.scatter(state, own, build_optimizer(name, own.values(), 1e-2, 0.0))


def test_a_run_resumes_exactly(name, arguments, tmp_path, monkeypatch):
    settings = ["lora.rank=128", f"train.optimizer={name}"]  # 2048 to 8192 parameters a matrix
    whole = train(arguments, *settings, f"run.dir={tmp_path / 'whole'}").run_dir
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(arguments, *settings)
    resumed = train(arguments, *settings)
    one, two = load_file(whole / lora.WEIGHTS), load_file(resumed.run_dir / lora.WEIGHTS)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert rows(whole) == rows(resumed.run_dir)
    if name == "adamw8bit":
        assert type(resumed.learner.optimizer).__name__ == "AdamW8bit"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda _: None)
    check_installed("adamw")
    with pytest.raises(ConfigError, match=r"pip install 'longreel\[bitsandbytes\]'.*=adamw\."):
        check_installed("adamw8bit")


def test_an_unknown_optimizer_is_refused(arguments):
    with pytest.raises(ConfigError, match="train.optimizer"):
        load([*arguments, "train.optimizer=lion"])


def test_lr_factor():
    assert [lr_factor(s, 4, 10, "constant") for s in (1, 4, 5, 10)] == [0.25, 1, 1, 1]
    cosine = [lr_factor(s, 2, 10, "cosine") for s in range(1, 11)]
    assert cosine[:2] == [0.5, 1.0] and cosine[-1] > 0
    assert all(a > b for a, b in zip(cosine[1:], cosine[2:], strict=False))
    assert lr_factor(1, 0, 5, "constant") == 1
