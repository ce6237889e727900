"""The step benchmark on tiny models and a CPU: every row, and whole models against few blocks."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import step
import torch
import training
from lib import agreement, speedup
from lib.blocks import STREAMS, count_blocks, with_blocks
from lib.rows import Caption, Point, Stepper, rows_for

from longreel.sparse.patterns import Radial
from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Config, Lora, Memory, Speed
from longreel.trainer.config.values import ConfigError
from longreel.trainer.step import LoadedModel

CPU = torch.device("cpu")
SHORT = ("height=64", "width=64", "sparse.block=16", "lora.rank=4")
NATIVE = {"wan": 9, "hunyuan": 9, "mochi": 7}
# What a step is said to take, by a block's stream and attention.
COSTS = {"dual dense": 5.0, "dual sparse": 1.5, "single sparse": 1.25, "single dense": 4.75}
COSTS |= {"block dense": 3.0, "block sparse": 2.0}


@pytest.fixture
def overrides(tmp_path):
    def of(family, *settings):
        short = [f"recipe=tiny_{family}", f"extend.native={NATIVE[family]}", *SHORT]
        return [*short, f"cache.dir={tmp_path / 'cache'}", *settings]

    return of


@pytest.fixture
def benchmark(overrides, tmp_path):
    def run(family, *settings):
        """The one section of the file, and its text."""
        path = step.benchmark([*overrides(family, *settings), f"out={tmp_path / 'results'}"])
        if not path.exists():
            return None, ""
        (section,) = speedup.read(path, training.setup()).sections.values()
        return section, path.with_suffix(".md").read_text()

    return run


@pytest.fixture
def jobs(overrides, tmp_path):
    def of(family, *settings):
        given = overrides(family, *settings)
        rows = rows_for(load(given))
        return {name: step.job_of(row, given, str(tmp_path)) for name, row in rows.items()}

    return of


@pytest.fixture
def unchecked(monkeypatch):
    """Nothing is computed before the rows: other tests are about that."""
    monkeypatch.setattr(agreement, "check", lambda *_: "")


@pytest.fixture
def linear(monkeypatch, unchecked):
    """Steps that take what their model's blocks cost, and 7 s more."""

    def timed(self, batches):
        attention, layer, seconds = self.learner.attention, 0, 7.0
        self.learner.update(1, self.batches)
        for stack, stream in reversed(STREAMS.items()):
            for _ in getattr(self.learner.transformer, stack, ()):
                kind = "dense" if attention.is_dense(layer) else "sparse"
                seconds, layer = seconds + COSTS[f"{stream} {kind}"], layer + 1
        return seconds

    monkeypatch.setattr(Stepper, "_timed", timed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_every_row(benchmark, family, capsys):
    section, text = benchmark(family, "gpu=h200", "repeats=1")
    rows = rows_for(replace(Config(), family=family, memory=Memory(base_dtype="float32")))
    assert list(section.rows) == list(rows)
    assert ("fused_modulation" in rows) == (family != "hunyuan")
    for name, row in section.rows.items():
        if name == "optimizer" and find_spec("bitsandbytes") is None:
            assert "needs the package bitsandbytes" in row.complaint and row.seconds is None
            continue
        assert not row.complaint and row.steps == 1
        assert row.parts is None and row.peak is None and not row.kernels()  # of a GPU alone
        assert row.points[0].held > 0
    assert section.check.startswith("Before timing: ") and section.check in text
    assert "radial over fair" in text and "one sparse block over a dense one" in text
    assert section.rows["stock"].predicted is None and section.rows["fair"].predicted > 0
    said = capsys.readouterr().out
    assert "in all about" in said and "sparse: " in said


@pytest.mark.parametrize(
    "family",
    ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan", "mochi"))],
)
def test_few_blocks_tell_of_the_whole_model(benchmark, linear, family):
    """A linear cost, and the bytes that a model with its adapter and moments holds."""
    names = "rows=stock,fair,radial,sparse"
    benchmark(family, names, "blocks=all", "repeats=1")
    section, _ = benchmark(family, names, "repeats=1")
    assert len(section.rows) == 8
    for name in ("stock", "fair", "radial", "sparse"):
        few, whole = section.rows[name], section.rows[f"{name} whole"]
        assert len(whole.points) == 1 and len(few.points) == 1 + len(few.whole)
        assert few.seconds == whole.seconds
        assert few.per_block == {kind: COSTS[kind] for kind in few.whole}
        held = few.design.total([point.held for point in few.points])
        assert held == pytest.approx(whole.points[0].held, rel=1e-3)


def test_rows_are_added_kept_and_replaced(benchmark, linear, monkeypatch):
    first, _ = benchmark("wan", "rows=radial", "repeats=1")
    both, _ = benchmark("wan", "rows=fair,radial", "repeats=2", "resume=true")
    assert both.rows["radial"] == first.rows["radial"] and both.rows["fair"].steps == 2
    again, _ = benchmark("wan", "rows=radial", "repeats=2", "caption=3", "warmup=short")
    assert list(again.rows) == ["radial", "fair"] and again.rows["radial"].steps == 2
    assert again.rows["radial"].command.endswith("repeats=2 warmup=short caption=3`")
    monkeypatch.setattr(LoadedModel, "load", lambda setup: pytest.fail("it ran"))
    benchmark("wan", "rows=fair,radial", "resume=true")
    benchmark("wan", "dry=true")
    monkeypatch.setattr(training, "measured_on", lambda: "another")
    with pytest.raises(SystemExit, match="measured with another setup"):
        benchmark("wan")


def test_what_is_measured_survives_a_killed_run(benchmark, monkeypatch, unchecked):
    """A row is in the file from its first counted step on."""
    real, steps = Stepper.step, []

    def stop(self, point):
        steps.append(point)
        if len(steps) == 4:  # the second turn of two points
            raise KeyboardInterrupt
        real(self, point)

    monkeypatch.setattr(Stepper, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark("wan", "rows=sparse")
    monkeypatch.setattr(LoadedModel, "load", lambda setup: pytest.fail("it ran"))
    section, _ = benchmark("wan", "rows=sparse", "resume=true")
    assert section.rows["sparse"].steps == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no more")]
)
def test_the_end_of_memory_is_a_row(benchmark, monkeypatch, unchecked, error):
    real = Stepper.step

    def stop(self, point):
        if self.job.config.memory.offload:
            raise error
        real(self, point)

    monkeypatch.setattr(Stepper, "step", stop)
    section, text = benchmark("wan", "rows=offload,sparse", "repeats=1")
    assert section.rows["offload"].complaint.startswith("out of memory: ")
    assert section.rows["sparse"].seconds
    assert "| offload | out of memory: " in text
    monkeypatch.setattr(Stepper, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark("wan", "rows=sparse")


@pytest.mark.parametrize("family", NATIVE)
def test_stock_is_diffusers_own(jobs, family):
    """Its processors and padded text, and the loss of the dense row all the same."""
    of = jobs(family)
    losses, shared = {}, {}
    for name in ("stock", "dense"):
        job = with_blocks(of[name], dict.fromkeys(count_blocks(of[name]), 1))
        stepper = Stepper(job, shared, CPU, Caption(5, padded=name == "stock"))
        processors = {
            type(module.processor).__module__.partition(".")[0]
            for name, module in stepper.learner.transformer.named_modules()
            if hasattr(module, "processor") and "refiner" not in name and "attn2" not in name
        }
        assert processors == {"diffusers" if name == "stock" else "longreel"}
        stepper.step(Point({}))
        longest = job.family.text.sequence_tokens
        text = longest and (longest if name == "stock" else 5)
        assert stepper.grid.text == text
        losses[name] = stepper.learner.update(2, stepper.batches)["loss"]
    assert losses["stock"] == pytest.approx(losses["dense"], rel=1e-5)


def test_models_share_their_weights(jobs):
    job, shared = jobs("hunyuan")["fair"], {}
    one, two = (
        Stepper(with_blocks(job, {"dual dense": n, "single dense": 1}), shared, CPU, Caption())
        for n in (1, 2)
    )
    many = dict(two.learner.transformer.named_parameters())
    for name, parameter in one.learner.transformer.named_parameters():
        assert (many[name] is parameter) == (not parameter.requires_grad)


@pytest.mark.parametrize("family", NATIVE)
def test_a_sparse_step_that_is_wrong_is_not_timed(jobs, monkeypatch, family):
    of = jobs(family)
    agreement.check(of["dense"], of["radial"], CPU)
    monkeypatch.setattr(agreement, "AllBlocks", Radial)
    with pytest.raises(SystemExit, match="nothing is timed"):
        agreement.check(of["dense"], of["radial"], CPU)


def test_the_recipes_settings_are_every_rows_but_the_baselines():
    given = ["recipe=hunyuan_2x", "memory.recompute=all_but_attention", "sparse.pattern.decay=2"]
    rows = rows_for(load(given))
    configs = {name: row.config(given) for name, row in rows.items()}
    assert configs["stock"].memory == configs["dense"].memory == Memory()
    assert configs["fair"].memory == configs["radial"].memory
    assert configs["stock"].lora == configs["dense"].lora == Lora()
    assert configs["fair"].lora == configs["radial"].lora == Lora(compute_dtype="bfloat16")
    assert configs["compute_dtype"].lora == Lora()
    own = Memory(recompute="all_but_attention", offload=True)
    assert configs["fair"].memory == own
    assert configs["fair"].speed == Speed(fused_norms=True)
    assert configs["stock"].speed == configs["dense"].speed == Speed()
    assert configs["recompute"].memory == replace(own, recompute="all")
    assert configs["offload"].memory == replace(own, offload=False)
    assert configs["sparse"].sparse.dense_layers == 0
    assert configs["radial"].sparse.pattern == Radial(decay=2)


def test_mistakes_are_told(overrides):
    for setting, message in {
        "rows=radical": "rows=radical is unknown",
        "blocks=2,1": "blocks=2,1 must be two numbers",
        "repeats=0": "repeats=0 must be positive",
        "stpes=3": "stpes is not a setting",
    }.items():
        with pytest.raises(ConfigError, match=message):
            step.benchmark(overrides("wan", setting))
