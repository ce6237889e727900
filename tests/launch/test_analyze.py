"""`longreel analyze`."""

import json

import pytest
import torch
from runs import arguments_of, train
from tiny import WAN, load_transformer, make_inputs, randomise
from videos import write_waves

from longreel.launch.analyze_command import analyze
from longreel.trainer.adapter import lora
from longreel.trainer.analysis import merge
from longreel.trainer.config.values import ConfigError

MASKS = ("radial", "spatial", "harmonic")


@pytest.fixture
def settings(tmp_path):
    return [f"masks=[{','.join(MASKS)}]", "sigmas=[0.5]", "rows=24", f"out={tmp_path}/figures.json"]


def figures_of(tmp_path):
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert tuple(figures["masks"]) == MASKS
    assert len(figures["layers"]) == 3 and figures["about"]["rows"] == 24
    for mask in figures["masks"].values():
        assert 0 < mask["recall"] < 1 + 1e-6 and 0 < mask["density"] <= 1
        assert mask["relative_mse"] >= 0
    return figures


def test_a_base_model_is_analysed(settings, tmp_path, capsys):
    recipe = ["recipe=tiny_wan", "extend.native=9", "height=64", "width=64", "sparse.block=16"]
    data = ["data.source=synthetic:spin", "data.synthetic.clips=1", f"cache.dir={tmp_path}"]
    analyze([*recipe, *data, *settings])
    printed = capsys.readouterr().out
    assert "random weights" in printed and "recalled mass" in printed
    assert figures_of(tmp_path)["about"]["adapter"] is None


@pytest.mark.slow
def test_a_run_is_analysed_with_its_adapter(settings, tmp_path):
    videos = write_waves(tmp_path / "videos", 2, 17, 64, 64, 16)
    arguments = arguments_of("wan", videos, tmp_path / "cache", tmp_path / "run")
    train(arguments, "train.steps=2", "train.lr=0.1", "validate.videos=0")
    analyze([f"run={tmp_path / 'run'}", *settings])
    adapted = figures_of(tmp_path)
    analyze([*arguments, *settings])
    base = figures_of(tmp_path)
    assert adapted["about"]["adapter"] == str(tmp_path / "run")
    assert adapted["layers"]["2"] != base["layers"]["2"]


def test_merging_an_adapter_is_running_with_it(tmp_path):
    adapted, plain = load_transformer(WAN), load_transformer(WAN)
    randomise(lora.attach(adapted, WAN, rank=4, alpha=2))
    lora.save(tmp_path, adapted, WAN, {"version": 1})
    merge(plain, str(tmp_path))
    inputs = make_inputs(WAN)
    with torch.no_grad():
        want, got = (m(**inputs, return_dict=False)[0] for m in (adapted, plain))
    base = load_transformer(WAN)(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (want - base).abs().max() > 100 * (want - got).abs().max()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["run=nowhere"], "run=nowhere is not the folder of a run"),
        (["recipe=tiny_wan", "masks=[radail]"], "masks=.*radail.*the patterns are dense, radial"),
        (["recipe=tiny_wan", "sigmas=[0.5,1.5]"], "above 0 and at most 1"),
        (["recipe=tiny_wan", "rows=-1"], "rows=-1 must not be negative"),
        (["recipe=tiny_wan", "out=x.txt"], "must be a .json file"),
        (["recipe=tiny_wan"], "data.path is not set"),
        (["recipe=tiny_wan", "data.source=synthetic:pan", "layers=[7]"], "layers 0 to 2"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(settings, words, tmp_path):
    if settings[0].startswith("recipe"):
        settings = [*settings, f"cache.dir={tmp_path}"]
    with pytest.raises(ConfigError, match=words):
        analyze(settings)


def test_a_run_brings_its_own_settings():
    with pytest.raises(ConfigError, match="leave recipe=tiny_wan out"):
        analyze(["run=runs/x", "recipe=tiny_wan"])
