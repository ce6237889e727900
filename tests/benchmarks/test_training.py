"""Whole training steps as the benchmark makes them, on tiny models and a CPU."""

import re
import time
from dataclasses import replace

import pytest
import tiny
import torch
import training
from lib.untrained import random_transformer, untrained

from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES
from longreel.trainer.job import Job
from longreel.trainer.plan import predict, rates
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.step import Learner, LoadedModel

SHORT = ("height=64", "width=64", "sparse.block=16", "lora.rank=4")
NATIVE = {"wan": 9, "hunyuan": 9, "mochi": 7}


@pytest.fixture
def benchmark(tmp_path):
    def run(family: str, *settings: str):
        """The result file's rows by recipe, cells by column, and the recipes' sections."""
        arguments = [f"recipe=tiny_{family}", f"extend.native={NATIVE[family]}", *SHORT]
        places = [f"cache.dir={tmp_path / 'cache'}", f"out={tmp_path / 'results'}"]
        path = training.benchmark([*arguments, *places, *settings])
        head, sections = training.resumed(path, training.setup())
        titles, _, *lines = (line.strip("| ").split(" | ") for line in head[-1].splitlines())
        assert titles == list(training.COLUMNS)
        rows = {line[0].split()[0]: dict(zip(titles, line, strict=True)) for line in lines}
        return rows, {name.split()[0]: text for name, text in sections.items()}

    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_of_the_loaded_models_kind(name, dtype):
    """Dtypes of all parameters, those that stay in fp32 too, and buffers to the bit."""
    family = FAMILIES[name]
    loaded = tiny.load_transformer(family, dtype)
    made = random_transformer(family, tiny.folder(family), None, dtype, torch.device("cpu"))
    assert not made.training

    def kinds(model):
        return [(n, p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()]

    assert kinds(made) == kinds(loaded)
    buffers = dict(made.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert buffer.dtype == buffers.pop(key).dtype
        torch.testing.assert_close(dict(made.named_buffers())[key], buffer, rtol=0, atol=0)
    assert not buffers
    ones = {n for n, p in made.named_parameters() if (p == 1).all()}
    assert ones and all("norm" in n and n.endswith("weight") for n in ones)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_each_family(benchmark, name):
    started = time.perf_counter()
    rows, sections = benchmark(name, "gpu=h200", "commit=abc", "memory.offload=true", "steps=3")
    took = time.perf_counter() - started
    (row,), (text,) = rows.values(), sections.values()
    # Measured, on a CPU far from what is predicted for a GPU.
    steps = [float(s) for s in re.findall(r"^- step \d: ([\d.]+) s", text, re.MULTILINE)]
    assert len(steps) == 3 and 0 < sum(steps) < took
    assert float(row["first s"]) == steps[0]
    assert float(row["s"]) == pytest.approx(sum(steps[1:]) / 2, rel=0.01)
    assert float(row["s"]) > 3 * float(row["predicted s"]) > 0
    assert row["peak GiB"] == row["reserved GiB"] == row["GPU GiB"] == row["GiB error"] == "-"
    assert 0.1 < float(row["host GiB"]) < 100
    parts = [float(x) for x in row["forward / backward / optimizer s"].split(" / ")]
    assert sum(parts) == pytest.approx(float(row["s"]), rel=0.2) and min(parts) > 0
    rate = 1000 * float(row["PFLOP"]) / float(row["s"])
    assert float(row["TFLOP/s"]) == pytest.approx(rate, rel=0.02)
    # One half of the adapter learns from the first step, the other from the second.
    tensors = int(re.findall(r"adapter has (\d+)", text)[0])
    moved = [int(n) for n in re.findall(r"(\d+) gradients not zero", text)]
    assert moved == [tensors // 2, tensors, tensors]
    assert "Predicted for h200 before the run, by commit abc." in text
    assert "memory.offload=true" in row["recipe"] and "cache.dir" not in row["recipe"] + text


def test_rows_are_added_and_replaced(benchmark):
    benchmark("wan")
    rows, _ = benchmark("mochi", "steps=1")
    assert list(rows) == ["tiny_wan", "tiny_mochi"]
    assert rows["tiny_mochi"]["s"] == rows["tiny_mochi"]["predicted s"] == "-"
    again, sections = benchmark("wan", "steps=3")
    assert list(again) == list(sections) == ["tiny_wan", "tiny_mochi"]
    assert again["tiny_mochi"] == rows["tiny_mochi"]
    assert len(re.findall("^- step", sections["tiny_wan"], re.MULTILINE)) == 3


@pytest.mark.parametrize(
    "error, where",
    [(torch.OutOfMemoryError("CUDA out of memory."), "GPU"), (MemoryError("no more"), "host")],
)
def test_the_end_of_memory_is_a_row(benchmark, monkeypatch, error, where):
    real = Learner.update

    def stop(self, step, batches):
        if step == 2:
            raise error
        return real(self, step, batches)

    monkeypatch.setattr(Learner, "update", stop)
    rows, sections = benchmark("wan", "gpu=h200")
    said = f"out of {where} memory in batch of step 2"
    assert rows["tiny_wan"]["s"] == said and rows["tiny_wan"]["TFLOP/s"] == "-"
    assert float(rows["tiny_wan"]["first s"]) > 0
    assert f"\nEnded early: {said}." in sections["tiny_wan"]


def test_other_failures_are_not_rows(benchmark, monkeypatch, tmp_path):
    def fail(self, step, batches):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark("wan")
    assert not (tmp_path / "results").exists()


def test_a_file_of_another_machine_is_told_before_the_run(benchmark, monkeypatch):
    benchmark("wan", "steps=1")
    monkeypatch.setattr(training, "measured_on", lambda: "another")
    monkeypatch.setattr(LoadedModel, "load", lambda setup: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="measured with another setup"):
        benchmark("wan")


def test_moments_of_a_prediction_add_up():
    """HunyuanVideo at 2x: from the parts that `longreel plan` prints."""
    job = Job.from_config(load(["recipe=hunyuan_2x"]), published=True)
    made = predict.plan(job, rates.GPUS["h200"])
    parts = {name: size / 2**30 for name, size in made.memory.gpu.items()}
    moments = training.predicted_gib(made)
    assert moments["GiB at the peak"] == pytest.approx(sum(parts.values()) - rates.RESERVE)
    between = parts["frozen base"] + 0.75 * parts["LoRA, gradients, moments"]
    assert moments["GiB between steps"] == pytest.approx(between)
    kept = moments["GiB after the forward"] - between
    assert kept == pytest.approx(parts["block inputs"] + parts["positions"])


@pytest.mark.parametrize("recipe", ["hunyuan_2x", "mochi_4x", "wan_14b_2x", "wan_1_3b_2x"])
def test_published_models_need_no_files(recipe):
    """Down to the last parameter, on no device."""
    job = Job.from_config(load([f"recipe={recipe}"]), published=True)
    family = untrained(job.family, torch.device("meta"))
    blank = family.loader.blank_transformer(job.model_path, None)
    assert sum(p.numel() for p in blank.parameters()) == anatomy(job).params
    assert anatomy(replace(job, family=family)) == anatomy(job)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="stpes is not a setting"):
        training.benchmark(["recipe=tiny_wan", "stpes=3"])
    with pytest.raises(ConfigError, match="steps=0 must be positive"):
        training.benchmark(["recipe=tiny_wan", "steps=0"])


@pytest.mark.parametrize(
    "name, gib, expected",
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100_40"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100"),
        ("NVIDIA L4", 22.0, None),
    ],
)
def test_the_gpu_is_known_by_name_and_memory(monkeypatch, name, gib, expected):
    class Properties:
        total_memory = gib * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = training.gpu_found(torch.device("cuda"))
    assert (found and found.name) == expected
