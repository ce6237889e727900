"""`longreel plan`."""

import re

import pytest

from longreel.launch.commands import main
from longreel.launch.plan_command import plan
from longreel.trainer.config.recipe import recipe_names
from longreel.trainer.config.values import ConfigError


@pytest.fixture
def command(tmp_path, capsys):
    def run(recipe: str, *options: str) -> dict[str, str]:
        """The printed lines by name."""
        plan([f"recipe={recipe}", f"cache.dir={tmp_path / 'cache'}", *options])
        lines = capsys.readouterr().out.splitlines()
        named = [line.partition(":") for line in lines if not line.startswith("  ")]
        parts = [line.strip().rpartition("  ") for line in lines if line.startswith("  ")]
        return {name: text.strip() for name, _, text in (*named, *parts)}

    return run


ALWAYS = {
    "model", "length", "tokens", "attention", "operations", "memory", "host memory", "longest",
    "time", "run", "cache", "sampling", "rates", "note",
}  # fmt: skip


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_planned(command, recipe):
    lines = command(recipe)
    assert lines.keys() >= ALWAYS
    assert lines["note"].startswith("calibrated on hunyuan_2x")
    assert "nan" not in str(lines) and "inf" not in str(lines)
    assert ("change" in lines) == lines["memory"].endswith("does not fit")


def test_the_parts_of_memory_add_up(command):
    lines = command("hunyuan_2x")
    total = float(lines["memory"].partition(" GiB")[0])
    parts = [
        float(t.removesuffix(" GiB")) for k, t in lines.items() if re.fullmatch(r"[\d.]+ GiB", t)
    ]
    assert len(parts) > 8 and sum(parts) == pytest.approx(total, abs=0.1 * len(parts))


def test_options_of_the_command(command):
    one = command("wan_1_3b_2x", "clips=10")
    many = command("wan_1_3b_2x", "gpu=a100", "gpus=8", "memory=16", "price=2", "clips=1000")
    assert one["memory"].endswith("of 139.8 GiB: fits")
    assert many["memory"].endswith("of 16.0 GiB: does not fit")
    assert "8 samples on 8 x a100" in many["time"] and ", costs " in many["run"]
    assert "not measured" in many["rates"] and "not measured" not in one["rates"]
    seconds = [float(re.match(r"[\d.]+", lines["time"])[0]) for lines in (one, many)]
    assert seconds[1] > 2 * seconds[0]
    assert one["cache"].endswith("for 10 clips") and many["cache"].endswith("for 1000 clips")


def test_settings_of_the_recipe_count(command):
    dense = command("wan_1_3b_2x", "sparse.pattern.name=dense")
    assert dense["attention"].startswith("100.0% of all pairs")
    assert "frames of 480 x 832" in dense["length"]
    assert "81 -> 321" in command("wan_1_3b_2x", "extend.factor=4")["length"]


def test_gpus_that_share_a_clip(command):
    one, eight = command("hunyuan_4x"), command("hunyuan_4x", "parallel.sequence=8")
    assert "sharing" not in one and "1 sample on 8 x h200" in eight["time"]
    assert eight["sharing"].startswith("8 GPUs a sample: 57,856 tokens each, 3 heads in attention")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "recipe=NAME is missing"),
        (["recipe=tiny_wan", "clps=8"], "clps is not a setting. Did you mean clips?"),
        (["recipe=tiny_wan", "memory.chekpoint=1"], "Did you mean memory.recompute?"),
        (["recipe=tiny_wan", "gpu=h20"], "gpu=h20 is unknown. Did you mean h200?"),
        (["recipe=tiny_wan", "gpus=0"], "gpus=0 must be positive"),
        (["recipe=tiny_wan", "memory=nan"], "memory=nan is not a finite number"),
        (["hunyuan_2x"], "'hunyuan_2x' is not of the form key=value"),
        (
            ["recipe=wan_14b_2x", "gpu=a100", "memory.base_dtype=float8"],
            "memory.base_dtype=float8: gpu=a100 does not multiply in float8",
        ),
        (["recipe=tiny_wan", "memory=much"], "memory=much must be a number"),
        (["recipe=wan_1_3b_2x", "model.path=/no/such"], "model.path=/no/such cannot be loaded"),
        (["recipe=wan_1_3b_2x", "extend.factor=null", "frames=82"], "the nearest are 81 and 85"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError) as error:
        plan(options)
    assert message in str(error.value)


def test_what_is_advised_is_what_the_gpu_can(command):
    """Both GPUs have as much memory; float8 is Hopper's alone."""
    change = {gpu: command("wan_14b_4x", f"gpu={gpu}")["change"] for gpu in ("h100", "a100")}
    assert "memory.base_dtype=float8" in change["h100"]
    assert "float8" not in change["a100"] and "train.optimizer=adamw8bit" in change["a100"]


def test_plan_is_a_command(capsys):
    main(["plan", "recipe=wan_1_3b_4x"])
    assert "126,360: 81 x 30 x 52 video" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: gpu=b200 is unknown"):
        main(["plan", "recipe=wan_1_3b_4x", "gpu=b200"])
