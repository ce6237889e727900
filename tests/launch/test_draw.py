"""`longreel draw`."""

import re

import pytest
from PIL import Image

from longreel.launch.draw_command import draw
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families.loader import Loader


@pytest.fixture
def command(tmp_path, capsys):
    def run(*options: str) -> dict[str, str]:
        """The printed lines by name."""
        given = [f"cache.dir={tmp_path / 'cache'}", f"out={tmp_path / 'mask.png'}"]
        draw(["recipe=tiny_wan", "data.path=null", *given, *options])
        lines = capsys.readouterr().out.splitlines()
        return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}

    return run


def test_draw_writes_a_figure_and_says_what_is_computed(command, tmp_path):
    lines = command()
    with Image.open(tmp_path / "mask.png") as image:
        assert image.format == "PNG" and min(image.size) > 400
    assert set(lines) == {
        "pattern", "tokens", "blocks", "density", "all layers", "reach", "time", "figure"
    }  # fmt: skip
    assert lines["pattern"].startswith("Radial(decay=")
    assert "sparse layers until every video token has reached every other" in lines["reach"]
    assert lines["figure"] == str(tmp_path / "mask.png")
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["mask.png"]


def test_draw_takes_the_settings_of_the_recipe(command):
    lines = command("sparse.pattern.name=dense", "sparse.dense_layers=1")
    assert lines["pattern"] == "Dense()"
    assert lines["density"].startswith("100.000%") and lines["reach"].startswith("1 sparse layers")


def test_draw_counts_layouts_and_dense_layers(command):
    lines = command("sparse.pattern.name=spatial_temporal", "sparse.dense_layers=1")
    sparse = f"{float(lines['density'].partition('%')[0]):.1f}%"
    assert "2 layouts" in lines["blocks"]
    assert lines["all layers"].endswith(f"over 3 layers: 100.0% in 0, {sparse} in 1-2")


def test_draw_solves_a_density_and_says_what_was_rounded(command):
    lines = command(
        "sparse.pattern.name=longlora", "sparse.density=0.2", "sparse.dense_layers=[-1]"
    )
    solved = re.fullmatch(r"share=(\S+) \(wanted 0.2, achieved 0.\d{4}\)", lines["width"])
    share = solved[1]
    assert lines["pattern"] == f"LongLora(share={share})"
    assert lines["note"].startswith(f"share={share} is ") and "groups are" in lines["note"]
    assert lines["all layers"].endswith("in 0-1, 100.0% in 2")


@pytest.mark.parametrize(
    "options, message",
    [
        (["out=mask.jpg"], "out=mask.jpg must end in .png"),
        (["out=nowhere/mask.png"], "out=nowhere/mask.png: nowhere is not a folder"),
        (["out=a.png", "out=b.png"], "out is given twice: 'a.png' and 'b.png'"),
        ([], "recipe=NAME is missing"),
        (["recipe=tiny_wan", "sparse.patern.name=dense"], "Did you mean sparse.pattern.name"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError) as error:
        draw(options)
    assert message in str(error.value)


def test_a_published_model_is_drawn_without_its_files(tmp_path, capsys, monkeypatch):
    def read(*_):
        raise AssertionError("a file of the model was asked for")

    monkeypatch.setattr(Loader, "read_json", read)
    draw(["recipe=wan_1_3b_2x", "sparse.pattern.name=power", f"out={tmp_path / 'mask.png'}"])
    assert "63,960: 41 x 30 x 52 video and 0 text tokens" in capsys.readouterr().out
