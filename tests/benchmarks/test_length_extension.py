"""The experiment in length extension: its cells, its training, its statistics, its controls."""

import dataclasses
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from length_extension import estimate, figures, page
from length_extension.cells import Cell, plan, solved
from length_extension.clips import Bank
from length_extension.controls import checks
from length_extension.pixels import PixelWan, to_latents, to_pixels
from length_extension.results import Result, Store, bootstrap, difference, interval, summary
from length_extension.run import Experiment, Options, run
from length_extension.sampling import captions_of, sample
from length_extension.settings import FULL, SET_NAMES, TINY
from length_extension.training import OutOfTime, Training, model_of, pretrain, regime_of, tuned
from length_extension.workers import Workers

from longreel.data.coherence import measure
from longreel.data.synthetic import CAPTIONS, ClipSet
from longreel.sparse.patterns import PATTERNS, Dense, Radial, Spatial
from longreel.trainer.config.values import ConfigError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MICRO = dataclasses.replace(
    TINY, layers=1, head_dim=16, ffn=32, clips=8, pretrain_steps=2, pretrain_batch=2, samples=2
)
FOREVER = math.inf


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of two steps, and the clips of twice its length."""
    out = tmp_path_factory.mktemp("base")
    folder = pretrain(MICRO, out, CPU, FOREVER, lambda: Bank(MICRO, 1, 2, CPU, Workers()))
    bank = Bank(MICRO, 2, 1, CPU, Workers())
    return folder, lambda: bank


# Cells


def test_every_pattern_has_a_cell_at_both_lengths():
    cells = plan([0, 1, 2])
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for factor in (2, 4):
        assert {cell.row for cell in cells if cell.factor == factor} > PATTERNS.keys() | {"none"}
        for row in ("radial", "dense", "spatial", "none"):
            seeds = [c.seed for c in cells if (c.row, c.factor, c.mark) == (row, factor, "steps")]
            assert seeds == [0, 1, 2]


def test_a_new_pattern_gets_its_rows_by_its_name(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Mine(Spatial):
        pass

    monkeypatch.setitem(PATTERNS, "mine", Mine)
    assert [cell.name for cell in plan([0], "mine")] == ["mine-4x-seed0", "mine-2x-seed0"]
    with pytest.raises(ConfigError, match=r"only=hers matches no cell. Rows: base.*mine"):
        plan([0], "hers")


def test_rows_are_at_radials_density():
    """But for those that cannot be, at the sizes of the real experiment."""
    apart = {"harmonic", "sliding_tile", "cube"}
    for factor in (2, 4):
        target = solved(Cell("radial", factor, pattern=Radial()), FULL)[1]
        for row in PATTERNS.keys() - apart - {"dense"}:
            (cell,) = (c for c in plan([0], row) if (c.factor, c.mark) == (factor, "steps"))
            assert solved(cell, FULL)[1] == pytest.approx(target, abs=0.011), row
    assert 0.155 < target < 0.165


def test_the_narrow_window_cannot_reach_across_the_gap():
    """Its blocks are walked over, at the sizes of the real experiment: the control's own bound."""
    (cell,) = plan([0], "window-of-1")
    pattern, _ = solved(cell, FULL)
    grid = FULL.grid(4)
    kept = pattern.blocks(grid, FULL.block)
    shown = ClipSet("occlude", FULL.arena(4)).scene(0).visible
    frame = torch.arange(len(kept)) * FULL.block // grid.per_frame
    reached = frame <= int(np.flatnonzero(~shown)[0])
    for _ in range(FULL.layers):
        reached = (kept & reached).any(1)
    assert frame[reached].max() < int(np.flatnonzero(~shown)[-1])


# Model, clips and training


def test_pixels_are_latents_and_back():
    clip = torch.from_numpy(ClipSet("pan", MICRO.arena(1)).clip(0))[None]
    latents = to_latents(clip, MICRO.squeeze)
    grid = MICRO.grid(1)
    assert latents.shape == (1, 48, grid.frames, grid.height, grid.width)
    assert torch.equal(to_pixels(latents, MICRO.squeeze), clip)
    # A token holds one square of one frame.
    square = clip[0, 3, 4:8, 8:12].float() / 255
    there = latents[0, :, 3, 1, 2].view(3, 4, 4).permute(1, 2, 0) * 0.35 + 0.25
    torch.testing.assert_close(there, square)


def test_the_model_is_of_the_size_that_the_experiment_names():
    with torch.device("meta"):
        transformer = PixelWan.at(FULL).build(0)
    count = sum(p.numel() for p in transformer.parameters())
    assert 10e6 < count < 15e6
    assert FULL.parameters == pytest.approx(count, rel=0.1)
    assert (len(FULL.grid(1)), FULL.grid(4).per_frame) == (2520, 120)


def training(base, out, seed=0, method="lora"):
    folder, bank = base
    family = PixelWan.at(MICRO)
    cell = Cell("radial", 2, seed, method=method, pattern=Radial())
    model = model_of(cell, family, folder, CPU)
    return Training(family, model, regime_of(cell, MICRO), bank, out / "run", CPU)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_that_was_stopped_goes_on_exactly(base, tmp_path, method):
    whole = training(base, tmp_path / "whole", method=method)
    whole.run(lambda record: record.step >= 4, FOREVER)
    stopped = training(base, tmp_path / "stopped", method=method)
    stopped.run(lambda record: record.step >= 1, FOREVER)
    with pytest.raises(OutOfTime):
        stopped.run(lambda record: record.step >= 4, time.monotonic() - 1)
    resumed = training(base, tmp_path / "stopped", method=method)
    assert resumed.record.step == 2
    resumed.run(lambda record: record.step >= 4, FOREVER)
    moved = False
    start = training(base, tmp_path / "new", method=method).parameters
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        moved |= not torch.equal(parameter, start[name])
    assert moved


def test_one_run_serves_both_marks(base, tmp_path):
    """Seconds that end before the steps, and after them."""
    folder, bank = base
    family = PixelWan.at(MICRO)
    for seed, budget in ((0, 1e-9), (1, 0.5)):
        cell = Cell("dense", 2, seed, pattern=Dense())
        timed = dataclasses.replace(cell, mark="seconds")
        made = {}
        for which in (cell, timed):
            model, record = tuned(which, family, folder, tmp_path, CPU, FOREVER, bank, budget)
            made[which.mark] = record
            weights = {k: p for k, p in model.named_parameters() if "lora_B" in k}
            assert any(p.abs().max() > 0 for p in weights.values())
        assert made["steps"].step == MICRO.steps
        assert made["seconds"].seconds >= budget
        assert (made["seconds"].step < MICRO.steps) == (budget < 1e-6)


def test_a_run_that_went_past_a_mark_unasked_begins_anew(base, tmp_path):
    """Radial's seconds may be known only after dense has had its steps."""
    folder, bank = base
    family, cell = PixelWan.at(MICRO), Cell("dense", 2, pattern=Dense())
    _, whole = tuned(cell, family, folder, tmp_path, CPU, FOREVER, bank, None)
    timed, budget = dataclasses.replace(cell, mark="seconds"), 1e-9
    _, record = tuned(timed, family, folder, tmp_path, CPU, FOREVER, bank, budget)
    assert (whole.step, record.step) == (MICRO.steps, 1)


def test_a_model_that_is_loaded_samples_as_the_one_that_was_trained(base, tmp_path):
    folder, bank = base
    family, cell = PixelWan.at(MICRO), Cell("radial", 2, pattern=Radial())
    clips = []
    for _ in range(2):
        model, _ = tuned(cell, family, folder, tmp_path, CPU, FOREVER, bank, None)
        settings = {"seed": 0, "other_captions": False, "device": CPU}
        clips.append(sample(model, family, 2, "spin", **settings))
    assert clips[0].shape == (2, 17, 24, 24, 3)
    assert np.array_equal(*clips)
    assert not np.array_equal(clips[0][0], clips[0][1])  # noise differs from clip to clip


@pytest.mark.slow
def test_processes_draw_and_measure_the_same():
    source, workers = ClipSet("mix", MICRO.arena(1)), Workers(2)
    clips = workers.map(source.clip, range(60))
    assert all(np.array_equal(clip, source.clip(index)) for index, clip in enumerate(clips))
    spins = np.stack([ClipSet("spin", MICRO.arena(1)).clip(index) for index in range(50)])
    here = [measure("spin", clip, 9) for clip in spins]
    assert repr(workers.measure("spin", spins, 9)) == repr(here)  # NaN equals nothing


def test_other_captions_are_the_other_of_each_set():
    source = ClipSet("spin", MICRO.arena(1), 3)
    usual, other = (captions_of(source, 8, other=other) for other in (False, True))
    assert all({a, b} == set(CAPTIONS["spin"]) for a, b in zip(usual, other, strict=True))


def test_a_measured_cell_is_not_measured_again(tmp_path, monkeypatch, capsys):
    """And one of which some sets are measured goes on with the others."""
    monkeypatch.setattr("length_extension.run.SCALES", {"tiny": MICRO})
    options = Options(scale="tiny", out=str(tmp_path), only="base", seeds="0")
    assert run(options)
    store = Store(tmp_path)
    result = store.load("base-1x-seed0")
    assert result.complete and "base-1x-seed0" in capsys.readouterr().out
    kept = result.sets["pan"]
    del result.sets["spin"]
    store.save("base-1x-seed0", result)
    assert not run(dataclasses.replace(options, seconds=1e-9))
    assert "spin not sampled" not in capsys.readouterr().out  # not even begun
    assert run(options)
    again = store.load("base-1x-seed0")
    assert again.complete and again.sets["pan"] == kept
    capsys.readouterr()
    assert run(options)
    assert "base-1x-seed0:" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other sizes"):
        Experiment(dataclasses.replace(MICRO, ffn=64), tmp_path, 0)
    with pytest.raises(ConfigError, match="run only=radial-4x-seed0 first"):
        run(dataclasses.replace(options, only="dense-4x-seed0-seconds"))


def test_calls_share_the_cells(tmp_path, monkeypatch):
    """A call leaves cells to the call that is at them, and waits with what rests on these."""
    monkeypatch.setattr("length_extension.run.SCALES", {"tiny": MICRO})

    def nobody_waits(seconds):
        raise OutOfTime("it would wait")

    monkeypatch.setattr("length_extension.run.time.sleep", nobody_waits)
    cells = [Cell("none", 1, seed, method="none") for seed in (0, 1)]
    cells += [Cell("radial", 2, pattern=Radial()), Cell("dense", 2)]
    monkeypatch.setattr("length_extension.run.plan", lambda seeds, only: cells)
    options = Options(scale="tiny", out=str(tmp_path))
    measured = []
    monkeypatch.setattr(
        Experiment, "_measure", lambda self, cell, *_: measured.append((cell.row, cell.seed))
    )
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks/none-1x-seed0.lock"):
        with FileLock(tmp_path / "locks/radial-2x-seed0.lock"):
            assert not run(options)
        assert set(measured) == {("none", 1)}
    measured.clear()
    with FileLock(tmp_path / "locks/base.lock"):
        assert not run(options)
    assert not measured


# Statistics, controls and the page


def test_intervals_cover_the_mean_as_often_as_they_say():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = bootstrap([random.normal(0, 1, 64)])
        covered += found.low <= 0 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_seeds_that_differ_widen_the_interval():
    random = np.random.default_rng(0)
    clips = random.normal(0, 0.1, (3, 64))
    alike = bootstrap(list(clips))
    apart = bootstrap([values + shift for values, shift in zip(clips, (-1, 0, 1), strict=True)])
    assert apart.mean == pytest.approx(alike.mean, abs=1e-9)
    assert apart.high - apart.low > 10 * (alike.high - alike.low)
    some = bootstrap([np.r_[clips[0], np.full(64, math.nan)]])
    assert some.told == 0.5 and some.mean == pytest.approx(clips[0].mean())
    assert bootstrap([np.full(4, math.nan)]) is None


def results_of(store, row, factor, seeds=(0,), **figures):
    """A cell whose every clip has the figures, with a little noise; 0.5 for the rest."""
    random = np.random.default_rng(0)
    for seed in seeds:
        cell = Cell(row, factor, seed)
        about = {"cell": cell.describe(), "measured_on": "a test"}
        result = Result(0.16, 100, about, {"step": 5, "seconds": 2.0, "losses": []})
        for name in SET_NAMES:
            keys = {column.metric for column in page.COLUMNS} | {
                "agree@10",
                "loop_far",
                "clock_error",
            }
            rows = []
            for _ in range(32):  # in an order that is the same in every process
                row_of = dict.fromkeys(sorted(keys), 0.5) | figures
                rows.append({k: v + random.normal(0, 0.01) for k, v in row_of.items()})
            result.sets[name] = rows
        store.save(cell.name, result)


GOOD = {"visible": 1, "agree@10": 1, "trajectory_rmse": 0.01, "angular_speed_error": 0.02} | {
    "loop_far": 25, "ends": 1, "clock_error": 0.01
}  # fmt: skip
BAD = {"trajectory_rmse": 0.2, "angular_speed_error": 0.6, "ends": 0.3, "clock_error": 0.2}


def test_controls_hold_where_they_should_and_fail_where_not(tmp_path):
    store = Store(tmp_path)
    assert [check.passed for check in checks(store, FULL)] == [None, None, None, True, None]
    results_of(store, "base", 1, **GOOD)
    results_of(store, "base-other-captions", 1, **GOOD)
    results_of(store, "none", 4, **BAD)
    results_of(store, "window-of-1", 4, ends=1 / 6)
    assert all(check.passed for check in checks(store, FULL)), checks(store, FULL)
    results_of(store, "base", 1, **GOOD | {"loop_far": 12})
    results_of(store, "base-other-captions", 1, **GOOD | {"angular_speed_error": 0.1})
    results_of(store, "none", 4, **GOOD)
    results_of(store, "window-of-1", 4, ends=0.4)
    assert [c.passed for c in checks(store, FULL)] == [False, False, False, True, False]


def test_mistakes_of_the_command_leave_the_page_alone(tmp_path):
    before = page.PAGE.read_text()
    with pytest.raises(ConfigError, match=f"out={tmp_path} holds no results to fill the page with"):
        run(Options(out=str(tmp_path), page="only"))
    with pytest.raises(ConfigError, match="seconds=-1.0 must not be negative"):
        run(Options(out=str(tmp_path), seconds=-1.0))
    assert page.PAGE.read_text() == before


def test_the_page_says_what_was_found_and_whether_to_believe_it(tmp_path):
    store, path = Store(tmp_path), tmp_path / "page.md"
    path.write_text(page.PAGE.read_text())
    page.write(store, FULL, tmp_path, path)
    assert "Not run yet" in path.read_text()
    for row, found in (("radial", {"ends": 0.6}), ("dense", {"ends": 0.9}), ("spatial", BAD)):
        results_of(store, row, 4, (0, 1, 2), **found)
    page.write(store, FULL, tmp_path, path)
    text = path.read_text()
    assert "Not to be believed yet" in text.split("##")[0]
    assert "worse occlude: same colour after the gap (-0.3 [" in text
    assert "better bounce: path RMSE" not in text.split("against the window")[0]
    assert "better bounce: same colour at both ends" in text.split("against the window")[1]
    assert re.search(r"\| `radial` \| 3 \| 16.0% \| 5 in 2 s \| 0\.(6|59\d) \(0.59", text)
    figures_of = summary(store)["radial-4x-seed1"]["figures"]["occlude"]["ends"]
    assert figures_of[0] == pytest.approx(0.6, abs=0.01) and figures_of[3] == 1
    once = text
    page.write(store, FULL, tmp_path, path)
    assert path.read_text() == once


def test_differences_are_of_pairs(tmp_path):
    store = Store(tmp_path)
    results_of(store, "radial", 4, ends=0.7)
    results_of(store, "dense", 4, ends=0.6)
    first, second = store.of_row("radial", 4), store.of_row("dense", 4)
    found = difference(first, second, "occlude", "ends")
    apart = interval(first, "occlude", "ends")
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.low < 0.01 * (apart.high - apart.low) + 1e-4  # the noise is shared


def test_the_estimate_counts_what_the_formulas_say():
    cell = Cell("dense", 4, pattern=Dense())
    tokens, scale = 9720, FULL
    pairs = 4 * tokens**2 * 256 * 10
    products = 2 * scale.layers * (6 * 256**2 + 2 * 256 * 1280) * tokens
    train = scale.steps * scale.batch * (2 * products + 3.5 * pairs)
    sampled = 6 * scale.samples * scale.sample_steps * (products + pairs)
    assert estimate.cost(cell, scale).tflop == pytest.approx((train + sampled) / 1e12, rel=1e-6)
    text = estimate.table(plan([0, 1, 2]), scale)
    minutes = int(text.split("about ")[1].split(" minutes")[0])
    assert 30 < minutes < 100  # three or four sessions of 25 minutes


@pytest.mark.slow
def test_the_whole_chain_in_miniature(tmp_path):
    """`make experiment-tiny`, stopped in between and gone on with; then its figures and page."""
    command = [sys.executable, "benchmarks/extend.py", "scale=tiny", f"out={tmp_path}", "seeds=0,1"]
    first = subprocess.run([*command, "seconds=20"], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 3, first.stdout + first.stderr
    assert "run the same command to resume" in first.stdout
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    store = Store(tmp_path)
    for cell in plan([0, 1]):
        result = store.load(cell.name)
        assert result.complete and (result.train["step"] > 0) == (cell.method != "none")
    made = figures.draw(store, TINY, tmp_path / "strips", tmp_path / "figures")
    assert len(made) == 4 and all(path.stat().st_size > 5000 for path in made)
    path = tmp_path / "page.md"
    path.write_text(page.PAGE.read_text())
    text = page.write(store, TINY, tmp_path, path).read_text()
    for row in PATTERNS:
        assert f"| `{row}` |" in text
    assert "recalled mass" in text  # of the two trained models that attend densely
