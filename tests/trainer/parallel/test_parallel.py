"""Processes that share clips learn what one process learns."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import processes
import pytest
import sampled_together
import tiny
import torch
from parallel_cases import PATTERNS, Case, build, update_alone
from runs import arguments_of, assert_the_same_run, rows, train, with_settings
from safetensors.torch import load_file

from longreel.launch.plan_command import plan
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES
from longreel.trainer.job import Job
from longreel.trainer.parallel import sequence
from longreel.trainer.parallel.sequence import SequenceGroup
from longreel.trainer.run import checkpoint

ROOT = Path(__file__).resolve().parents[3]


def torchrun(processes: int, *arguments: str, zero: bool = False) -> None:
    """A script of ours on so many processes over gloo. zero: under DeepSpeed, which accelerate has
    on a CPU if it is not told that it is one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment |= {"DS_ACCELERATOR": "cpu"} if zero else {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, f"--nproc_per_node={processes}", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def updates_together(processes: int, cases: list[Case], file: Path) -> dict[str, torch.Tensor]:
    given = json.dumps([asdict(case) for case in cases])
    torchrun(
        processes,
        "tests/helpers/parallel_cases.py",
        str(file),
        given,
        zero="zero" in cases[0].engine,
    )
    return load_file(file)


def check(case: Case, processes: int, together: dict[str, torch.Tensor]) -> float:
    """The largest relative error of what is learnt of a tensor in two updates, of its moments, of
    the losses and gradient norms; fp32."""
    errors = {}
    for name, exact in update_alone(case, processes // case.sequence).items():
        got = together[f"{case.name}/{name}"]
        errors[name] = ((got - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        if not exact.any():  # of Mochi's last text queries, which nothing reads
            errors[name] = got.abs().max().item()
    # Wan's text: 512 keys, nearly all of padding, hardly tell the queries apart.
    bound = {name: 2e-4 if "attn2" in name else 1e-5 for name in errors}
    too_large = {name: error for name, error in errors.items() if not error < bound[name]}
    assert not too_large, f"{case}: {too_large}"
    return max(errors.values())


# Every pair of a family with a setting, and of most settings, is in one of them.
PAIRWISE = [
    case
    for family in FAMILIES
    for case in (
        Case(family, recompute="all", accumulate=2),
        Case(family, "spatial_temporal", frames=11, recompute="all_but_attention", offload=True),
        Case(family, "sliding_tile", texts=(1,), fused=True, targets="attention+text"),
        Case(family, "dense", texts=(9, 4), recompute="all", mlp_chunk=32, rope="interpolate"),
    )
] + [
    Case("wan", engine="fsdp2", sequence=1, recompute="all", fused=True),
    Case("hunyuan", "sliding_tile", engine="fsdp2", recompute="all_but_attention", accumulate=2),
    Case("mochi", "spatial_temporal", engine="fsdp2", texts=(9, 4), mlp_chunk=32, fused=True),
]


@pytest.mark.long
def test_two_processes_that_share_clips_update_as_one(tmp_path):
    """They run in one launch, which takes longer than all that runs in it."""
    together = updates_together(2, PAIRWISE, tmp_path / "updates.safetensors")
    for case in PAIRWISE:
        print(f"{check(case, 2, together):.1e}: {case}")


SIZES = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}  # processes, and how many of them may share clips


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("processes", SIZES)
def test_every_family_pattern_and_checkpoint(processes, engine, tmp_path):
    """Data parallel, sharing clips and both, under each engine, one launch for each and each number
    of processes. `make test-slow ARGS="tests/trainer/parallel -s -k every_family"`."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    varied = itertools.cycle([(9, (3, 7)), (11, (1,)), (10, (6, 2))])
    every = itertools.product(("none", "all", "all_but_attention"), (1, 2))
    settings = (
        list(every) if engine == "ddp" else [("none", 2), ("all", 1), ("all_but_attention", 2)]
    )
    patterns = PATTERNS if engine == "ddp" else ("radial", "sliding_tile")
    cases = [
        Case(
            *(family, pattern, *next(varied)),
            recompute=recompute,
            accumulate=accumulate,
            sequence=size,
            engine=engine,
        )
        for family, pattern, (recompute, accumulate), size in itertools.product(
            FAMILIES, patterns, settings, SIZES[processes]
        )
    ]
    together = updates_together(processes, cases, tmp_path / "updates.safetensors")
    worst: dict[tuple[str, int], float] = {}
    for case in cases:
        key = case.family, case.sequence
        worst[key] = max(worst.get(key, 0.0), check(case, processes, together))
    found = ", ".join(f"{family} x {size}: {error:.1e}" for (family, size), error in worst.items())
    print(f"{engine}, {processes} processes, {len(cases)} cases: relative errors at most {found}")


def test_one_process_is_left_as_it_is():
    """No hook, no exchange: what runs is what ran before there was a choice."""
    family, transformer = build(Case("wan"), SequenceGroup())
    ends = (getattr(transformer, family.split.embedder), transformer.rope, transformer.proj_out)
    assert not any(module._forward_hooks for module in ends)
    assert transformer.blocks[0].attn1.processor.attention.exchange is None


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_hold_nothing_of_the_other_tokens(name, monkeypatch):
    """A view of a part would keep the whole clip's tokens in memory."""
    monkeypatch.setattr(
        sequence, "_all_to_all", lambda x, group, sent, got: x.new_zeros(sum(got), *x.shape[1:])
    )
    family, transformer = build(Case(name), SequenceGroup(size=2, rank=1))
    seen = []

    def watch(module, args, kwargs):
        flat = [*args, *kwargs.values()]
        flat = [y for x in flat for y in (x if isinstance(x, tuple) else [x])]
        seen.extend(x for x in flat if isinstance(x, torch.Tensor) and 67 in x.shape)

    blocks = transformer.blocks if name == "wan" else transformer.transformer_blocks
    blocks[0].register_forward_pre_hook(watch, with_kwargs=True)
    out = transformer(**tiny.make_inputs(family, texts=(3, 7)), return_dict=False)[0]
    assert out.shape[2:] == (9, 6, 10)
    assert len(seen) == 3  # tokens, cos, sin, of 67 of 135 tokens
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in seen)


@pytest.mark.parametrize("size, tokens", [(2, 135), (4, 135), (3, 10), (4, 4), (1, 7)])
def test_parts_are_even_and_in_order(size, tokens):
    parts = [SequenceGroup(size, rank).part(tokens) for rank in range(size)]
    assert [i for part in parts for i in range(tokens)[part]] == list(range(tokens))
    lengths = [part.stop - part.start for part in parts]
    assert lengths == SequenceGroup(size).counts(tokens)
    assert max(lengths) - min(lengths) <= 1


# Whole runs


def launch(processes: int, *runs: list[str]) -> None:
    """Training runs one after another on the same processes."""
    torchrun(processes, "tests/helpers/train_runs.py", json.dumps(runs))


@pytest.mark.slow
def test_a_run_of_two_processes_that_share_clips(arguments, tmp_path):
    """It equals that of one process, samples included, with a base that is whole in each and one in
    shards; resumed, by either number of them, as if never stopped.

    153 tokens; captions dropped and noise drawn alike in both processes; each run tries a step.
    """
    settings = [
        "height=48",
        "width=48",
        "train.batch=2",
        "train.gradient_accumulation=2",
        "train.lr=0.01",
    ]
    settings += [
        "train.caption_dropout=0.5",
        "memory.recompute=all_but_attention",
        "memory.trial_step=true",
    ]
    settings += ["validate.prompts=a wave", "validate.frames=9", "validate.every=2"]
    alone = train(arguments, *settings, f"run.dir={tmp_path / 'alone'}").run_dir
    shared = with_settings(arguments, *settings, "parallel.sequence=2")
    whole, halves, shards = (tmp_path / name for name in ("whole", "halves", "shards"))
    sharded = with_settings(shared, f"run.dir={shards}", "parallel.engine=fsdp2")
    launch(
        2,
        with_settings(shared, f"run.dir={whole}"),
        with_settings(shared, f"run.dir={halves}", "train.steps=2"),
        with_settings(shared, f"run.dir={halves}"),
        with_settings(sharded, "train.steps=2"),
        sharded,
    )
    assert_the_same_run(whole, alone)
    assert_the_same_run(shards, alone)
    assert rows(whole) == rows(halves)
    states = [run / "checkpoints/step-000004/state.safetensors" for run in (whole, halves)]
    assert states[0].read_bytes() == states[1].read_bytes()

    train(arguments, *settings, f"run.dir={shards}", "train.steps=5")
    assert checkpoint.latest(shards / "checkpoints").name == "step-000005"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_four_processes_in_two_pairs_are_two(name, videos, cache, tmp_path):
    """Data parallel beside it: each pair has clips and noise of its own."""
    settings = arguments_of(name, videos, cache, tmp_path / "two")
    sampled = ["validate.every=2", "validate.prompts=a wave"]
    settings = with_settings(settings, "train.batch=2", "train.lr=0.01", *sampled)
    pairs = with_settings(settings, f"run.dir={tmp_path / 'pairs'}", "parallel.sequence=2")
    launch(2, settings)
    launch(4, pairs)
    assert_the_same_run(tmp_path / "pairs", tmp_path / "two")
    train(settings, "train.steps=5")  # one goes on with what two have learnt
    saved = checkpoint.load_progress(tmp_path / "two/checkpoints/step-000005")
    assert (saved.world_size, saved.drawn) == (1, [4 * 2 * 2 + 2])


# Sampling


@pytest.mark.slow
def test_every_family_is_sampled_together(tmp_path):
    file = tmp_path / "videos.npz"
    ended = processes.finish(processes.start(2, "tests/helpers/sampled_together.py", str(file)))
    assert [code for code, _ in ended] == [0, 0], ended
    together = np.load(file)
    alone = sampled_together.videos(SequenceGroup())
    for family in FAMILIES:
        assert (alone[f"{family}, sparse"] != alone[f"{family}, dense"]).any()
    for name, video in alone.items():
        off = np.abs(together[name].astype(int) - video)
        print(f"{name}: of 255 at most {off.max()} off, {off.mean():.1e} on average")
        assert off.max() <= 1 and off.mean() < 1e-2 < 1 < video.std(), name


# What cannot be shared


def test_sizes_that_do_not_divide_are_refused(arguments):
    with pytest.raises(ConfigError, match="parallel.sequence=0 must be positive"):
        load([*arguments, "parallel.sequence=0"])
    with pytest.raises(
        ConfigError, match=r"^parallel.sequence=3 must divide the model's 2 heads; what does: 1, 2"
    ):
        Job.from_config(load([*arguments, "parallel.sequence=3"]))
    with pytest.raises(ConfigError, match=r"2 heads and the number of processes, 1; what does: 1"):
        train(arguments, "parallel.sequence=2")
    with pytest.raises(ConfigError, match=r"12 heads; what does: 1, 2, 3, 4, 6, 12\."):
        plan(["recipe=wan_1_3b_4x", "parallel.sequence=8"])


# Engines


@pytest.mark.slow
def test_a_run_under_fsdp2_is_a_run(arguments, tmp_path):
    """Data parallel: validation, samples, the step that is tried and checkpoints with a base in
    shards; one process without them goes on from what it saved."""
    settings = [
        "train.lr=0.01",
        "train.gradient_accumulation=2",
        "memory.trial_step=true",
        "validate.every=2",
    ]
    settings += ["validate.prompts=a wave", "validate.frames=9"]
    plain = with_settings(arguments, *settings, f"run.dir={tmp_path / 'plain'}")
    sharded = with_settings(plain, f"run.dir={tmp_path / 'sharded'}", "parallel.engine=fsdp2")
    halves = with_settings(sharded, f"run.dir={tmp_path / 'halves'}", "parallel.sequence=2")
    launch(2, plain, with_settings(sharded, "train.steps=2"), sharded, halves)
    assert_the_same_run(tmp_path / "sharded", tmp_path / "plain")
    train(halves, "parallel.engine=null", "parallel.sequence=1", "train.steps=5")
    assert checkpoint.latest(tmp_path / "halves/checkpoints").name == "step-000005"


def test_processes_that_do_not_know_of_each_other_are_refused(arguments, monkeypatch):
    """torchrun on a machine without a GPU starts such: each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started and accelerate knows of 1"):
        train(arguments)


def test_engines_that_cannot_be_are_refused(arguments, monkeypatch):
    with pytest.raises(ConfigError, match="parallel.engine=fsdp2 shards the moments"):
        load([*arguments, "parallel.engine=fsdp2", "train.optimizer=adamw8bit"])
    with pytest.raises(ConfigError, match="zero3 does not support float8 weights: use fsdp2"):
        load([*arguments, "parallel.engine=zero3", "memory.base_dtype=float8"])
    monkeypatch.setattr("longreel.trainer.parallel.open.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zero2 needs the package deepspeed.*longreel\[deepspe"):
        train(arguments, "parallel.engine=zero2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="configured for the first version of FSDP"):
        train(arguments)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="engine=ddp, but accelerate was launched for fsdp2"):
        train(arguments, "parallel.engine=ddp")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate then knows the processes")
def test_processes_of_torchrun_on_cpus_are_told_what_is_missing(arguments):
    """accelerate counts each as a run of its own unless it is told to use CPUs."""
    run = json.dumps([[*arguments, "parallel.engine=ddp"]])
    settings = {"ACCELERATE_USE_CPU": "false"}
    started = processes.start(2, "tests/helpers/train_runs.py", run, settings=settings)
    for code, said in processes.finish(started):
        assert code == 1 and "2 processes were started and accelerate knows of 1" in said, said
        assert "ACCELERATE_USE_CPU=true" in said and "zero" not in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("told", ["true", "false"])
def test_deepspeed_without_gpus_is_refused(arguments, monkeypatch, told):
    """It is so whether or not accelerate is told that there are none."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = json.dumps([[*arguments, "parallel.engine=zero2"]])
    started = processes.start(
        2, "tests/helpers/train_runs.py", run, settings={"ACCELERATE_USE_CPU": told}
    )
    for code, said in processes.finish(started):
        assert code == 1 and "GPUs" in said and "fsdp2" in said.splitlines()[-1], said


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("fsdp2", "fsdp2"),
        pytest.param("zero2", "zero2", marks=pytest.mark.slow),
        pytest.param("zero3", "zero3", marks=pytest.mark.slow),
        pytest.param("ddp", None, marks=pytest.mark.slow),
        pytest.param("cpu", None, marks=pytest.mark.slow),
    ],
)
def test_launch_files_name_their_engine(name, engine, monkeypatch):
    """Through what accelerate itself makes of the file."""
    pytest.importorskip("deepspeed") if name.startswith("zero") else None
    script = "from longreel.trainer.parallel.open import launched_engine as l; print('engine', l())"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--config_file", f"launch/{name}.yaml", "--no_python", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"engine {engine}" in done.stdout, done.stderr[-2000:]
