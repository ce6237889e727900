"""Hold what `load` promises: precedence, verbatim texts, and one clear message for each mistake."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longreel.sparse.patterns import PATTERNS, Dense, Power, Radial, SlidingTile
from longreel.trainer.config.recipe import (
    config_hash,
    load,
    load_file,
    pattern_from_dict,
    pattern_to_dict,
    recipe_names,
    save,
    to_dict,
    to_yaml,
)
from longreel.trainer.config.schema import Config, Rope, Sparse, Validate
from longreel.trainer.config.values import ConfigError, parse

TINY = "recipe=tiny_wan"


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives the argument that names it."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return f"recipe={path}"

    return write


def refusal(*arguments):
    with pytest.raises(ConfigError) as caught:
        load(list(arguments))
    return str(caught.value)


# precedence


def test_defaults_then_recipe_then_command_line(recipe):
    given = recipe("frames: 161\ntrain:\n  lr: 2e-5\n  steps: 300\n")
    config = load([given, "train.steps=200"])
    assert config.train.steps == 200  # the command line over the recipe
    assert config.train.lr == 2e-5  # the recipe over the default
    assert config.train.warmup == Config().train.warmup  # of the same group, untouched
    assert config.recipe == "mine"
    assert str(config.run_dir) == "runs/mine"


def test_a_recipe_by_name_and_by_path_is_the_same(recipe):
    text = to_yaml(load([TINY])).replace("recipe: tiny_wan\n", "")
    by_path = load([recipe(text)])
    assert dataclasses.replace(by_path, recipe="tiny_wan") == load([TINY])


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load([TINY]).frames = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_types_of_values():
    config = load(
        [TINY, "train.lr=2e-5", "log.wandb=no", "frames=null", "lora.alpha=8", "sparse.block=64"]
    )
    assert config.train.lr == 2e-5
    assert config.log.wandb is False
    assert config.frames is None
    assert isinstance(config.lora.alpha, float) and config.lora_alpha == 8
    assert config.sparse.block == 64
    assert load([TINY, "lora.alpha=null"]).lora_alpha == 16  # the rank


# texts


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a#b",
            "a # b",
            "k: v",
            "a=b=c",
            "x, y",
            "'quoted'",
            '"quoted"',
            " spaced ",
            "two\nlines",
        ),
        *(
            "${HOME}",
            "${",
            "\\${x}",
            "\\\\${x}",
            "$x",
            "{a}",
            "[a",
            "[a, b]",
            "*a",
            "&a",
            "!t",
            "%d",
        ),
        *(
            "yes",
            "010",
            "1e-5",
            "1.10",
            "2001-01-01",
            "~",
            "-",
            "a: ",
            "",
            "é漢🎬",
            "\x07",
            "tab\t",
        ),
    ],
)
def test_texts_are_verbatim(text, tmp_path):
    config = load([TINY, f"data.path={text}", f"cache.dir={text}"])
    assert config.data.path == config.cache.dir == text
    save(config, tmp_path / "config.yaml")
    assert load_file(tmp_path / "config.yaml") == config


def test_texts_of_a_recipe_are_as_written(recipe):
    given = recipe(
        "frames: 161\nmodel: {path: 2e-5, revision: 1.10}\ndata: {path: '${x}'}\n"
        "validate: {prompts: [yes, 5, 'a: b']}\n"
    )
    config = load([given])
    assert (config.model.path, config.model.revision, config.data.path) == ("2e-5", "1.10", "${x}")
    assert config.validate.prompts == ["yes", "5", "a: b"]


def test_prompts_need_no_quotes():
    def prompts(text):
        return load([TINY, f"validate.prompts={text}"]).validate.prompts

    assert prompts("A cat: black, slow #1, ${x}") == ["A cat: black, slow #1, ${x}"]
    assert prompts('["a, b", c]') == ["a, b", "c"]
    assert prompts("[]") == []
    assert load([TINY, "validate.sigmas=0.5"]).validate.sigmas == [0.5]
    assert load([TINY, "validate.sigmas=[1e-1, 1]"]).validate.sigmas == [0.1, 1.0]


# patterns


def test_pattern_parameters():
    config = load([TINY, "sparse.pattern.decay=0.5", "sparse.pattern.sink=false"])
    assert config.sparse.pattern == Radial(decay=0.5, sink=False)
    assert load([TINY]).sparse.pattern == Radial()
    assert load([TINY, "sparse.pattern.name=dense"]).sparse.pattern == Dense()


def test_another_pattern_drops_the_recipes_parameters(recipe):
    radial = recipe("frames: 161\nsparse: {block: 64, pattern: {name: radial, decay: 0.2}}\n")
    config = load([radial, "sparse.pattern.name=dense"])
    assert config.sparse.pattern == Dense()
    assert config.sparse.block == 64
    assert load([radial, "sparse.pattern.name=radial"]).sparse.pattern == Radial(decay=0.2)
    assert load([radial, "sparse.pattern.near=2"]).sparse.pattern == Radial(decay=0.2, near=2)


def test_another_pattern_keeps_the_parameters_given_with_it(recipe):
    dense = recipe("frames: 161\nsparse: {pattern: {name: dense}}\n")
    config = load([dense, "sparse.pattern.name=radial", "sparse.pattern.decay=0.3"])
    assert config.sparse.pattern == Radial(decay=0.3)
    # A parameter of the recipe's implied pattern, and one that the new pattern does not have.
    implied = recipe("frames: 161\nsparse: {pattern: {decay: 0.2}}\n")
    assert load([implied, "sparse.pattern.name=dense"]).sparse.pattern == Dense()
    message = refusal(implied, "sparse.pattern.name=dense", "sparse.pattern.decay=0.3")
    assert message == "sparse.pattern.decay is not a setting. Known: sparse.pattern.name."


@pytest.mark.parametrize("key", ["dense_layers", "dense_steps"])
def test_a_number_of_first_ones_or_a_list(key, recipe):
    def chosen(*arguments):
        return getattr(load([*arguments]).sparse, key)

    assert chosen(TINY, f"sparse.{key}=0") == 0 and chosen(TINY, f"sparse.{key}=3") == 3
    assert chosen(TINY, f"sparse.{key}=[]") == []
    assert chosen(TINY, f"sparse.{key}=[3, -1, 0, 0]") == [-1, 0, 3]
    given = recipe(f"frames: 161\nsparse: {{{key}: [1, -2]}}\n")
    assert chosen(given) == [-2, 1] and chosen(given, f"sparse.{key}=2") == 2


def test_a_density_goes_with_any_pattern():
    config = load([TINY, "sparse.pattern.name=power", "sparse.density=0.19"]).sparse
    assert config.density == 0.19 and config.pattern == Power()
    assert load([TINY, "sparse.density=null"]).sparse.density is load([TINY]).sparse.density is None


def test_patterns_as_plain_values():
    plain = pattern_to_dict(Radial(decay=0.5))
    assert plain == {"name": "radial", "decay": 0.5, "sink": True, "near": 1, "rule": "density"}
    assert pattern_from_dict(json.loads(json.dumps(plain))) == Radial(decay=0.5)
    assert pattern_from_dict({"name": "dense"}) == Dense()
    for wrong, message in (
        ({"name": "radal"}, "sparse.pattern.name=radal is unknown. Did you mean radial?"),
        ({"name": "radial", "dcay": 1}, "Did you mean sparse.pattern.decay?"),
        ({"name": "radial", "decay": "x"}, "sparse.pattern.decay=x must be a number."),
        ({"name": "radial", "decay": -1.0}, "sparse.pattern.decay=-1.0 must be positive"),
        ({"name": "sliding_tile", "tile": "6x8"}, "sparse.pattern.tile=6x8 must be three sizes"),
    ):
        with pytest.raises(ConfigError) as caught:
            pattern_from_dict(wrong)
        assert message in str(caught.value)


# mistakes

MISTAKES = {
    # unknown keys: a typo in the last part, in a group, a prefix left out, nothing near
    "train.stps=3": "train.stps is not a setting. Did you mean train.steps?",
    "lora.rnk=3": "lora.rnk is not a setting. Did you mean lora.rank?",
    "tran.lr=3": "tran.lr is not a setting. Did you mean train.lr?",
    "sparse.patern.decay=1": "is not a setting. Did you mean sparse.pattern.decay?",
    "lr=3": "lr is not a setting. Did you mean train.lr?",
    "steps=3": "steps is not a setting. Did you mean train.steps?",
    "sparse.decay=1": "sparse.decay is not a setting. Did you mean sparse.pattern.decay?",
    "train.steps.x=3": "train.steps.x is not a setting. Did you mean train.steps?",
    "lora.r=3": "Known: lora.rank, lora.alpha, lora.targets, lora.dropout, lora.compute_dtype.",
    "nonsense=3": "nonsense is not a setting. Known: recipe, family, frames, height,",
    "lora=3": "lora is a group of settings: give one of lora.rank, lora.alpha, lora.targets",
    "sparse.pattern=radial": "sparse.pattern is a group of settings: give one of sparse.pattern.na",
    # the form of an argument
    "train.steps": "'train.steps' is not of the form key=value.",
    "=3": "'=3' is not of the form key=value.",
    TINY: "recipe is given twice: 'tiny_wan' and 'tiny_wan'.",
    # types
    "train.steps=abc": "train.steps=abc must be a whole number.",
    "train.steps=2.5": "train.steps=2.5 must be a whole number.",
    "train.steps=null": "train.steps=null must be a whole number.",
    "train.steps=${x}": "train.steps=${x} must be a whole number.",
    "train.steps=[1]": "train.steps=[1] must be a whole number.",
    "frames=long": "frames=long must be a whole number, or null.",
    "train.lr=fast": "train.lr=fast must be a number.",
    "data.strict=maybe": "data.strict=maybe must be true or false.",
    "sparse.backend=Triton": "sparse.backend=Triton must be one of auto, triton, flex, fa4, refer",
    "train.sigma.name=normal": "train.sigma.name=normal must be one of uniform, logit_normal.",
    "validate.sigmas=[0.5, x]": "validate.sigmas=['0.5', 'x'] must be a list of numbers.",
    "validate.prompts=null": "validate.prompts=null must be a list of texts.",
    "validate.prompts=[a, b": "validate.prompts=[a, b is not a list such as [a, b]",
    "validate.prompts=[a: b]": "must be a plain list; an item with `: ` or brackets needs quotes.",
    # patterns
    "sparse.pattern.name=radal": "sparse.pattern.name=radal is unknown. Did you mean radial?",
    "sparse.pattern.name=": "sparse.pattern.name= is unknown. Known: dense, radial, harmonic, "
    "spatial, temporal, spatial_temporal, power, longlora, sliding_tile, cube.",
    "sparse.pattern.dcay=1": "sparse.pattern.dcay is not a setting. Did you mean sparse.pattern.de",
    "sparse.pattern.decay=far": "sparse.pattern.decay=far must be a number.",
    "sparse.pattern.decay=0": "sparse.pattern.decay=0.0 must be positive",
    "sparse.pattern.decay=inf": "sparse.pattern.decay=inf is not a finite number.",
    "sparse.pattern.rule=cover": "sparse.pattern.rule=cover must be one of density, touch, eq4.",
    "sparse.pattern.half_width=1": "sparse.pattern.half_width is not a setting. Known: sparse.patt",
    # dense layers and steps
    "sparse.dense_layers=two": "sparse.dense_layers=two must be a whole number, or a list of",
    "sparse.dense_layers=null": "sparse.dense_layers=null must be a whole number, or a list",
    "sparse.dense_layers=1.5": "sparse.dense_layers=1.5 must be a whole number, or a list of",
    "sparse.dense_steps=[0, x]": "must be a whole number, or a list of indices such as [0, -1].",
    "sparse.dense_steps=[0, null]": "must be a whole number, or a list of indices such as [0, -1].",
    "sparse.dense_steps=[[0]]": "must be a plain list",
    "sparse.dense_steps=[0": "sparse.dense_steps=[0 is not a list such as [a, b]",
    # ranges
    "sparse.dense_layers=-1": "sparse.dense_layers=-1 must not be negative.",
    "sparse.density=0": "sparse.density=0.0 must be above 0 and at most 1.",
    "sparse.density=19": "sparse.density=19.0 must be above 0 and at most 1.",
    "frames=-1": "frames=-1 must be positive.",
    "extend.factor=0": "extend.factor=0 must be positive.",
    "train.lr=0": "train.lr=0.0 must be positive.",
    "train.lr=nan": "train.lr=nan is not a finite number.",
    "lora.rank=0": "lora.rank=0 must be positive.",
    "train.seed=-1": "train.seed=-1 must not be negative.",
    "train.seed=4294967296": "train.seed=4294967296 must be at least 0 and below 2^32.",
    "memory.offload_keep=-1": "memory.offload_keep=-1 must not be negative.",
    "memory.mlp_chunk=-1": "memory.mlp_chunk=-1 must not be negative.",
    "memory.recompute=some": "memory.recompute=some must be one of none, all, all_but_attention.",
    "data.stride=-2": "data.stride=-2 must not be negative.",
    "lora.dropout=1": "lora.dropout=1.0 must be at least 0 and below 1.",
    "sparse.block=100": "sparse.block=100 must be 16, 32, 64 or 128",
    "sparse.block=8": "sparse.block=8 must be 16, 32, 64 or 128",
    "train.warmup=500": "train.warmup=500 is more than train.steps=80.",
    "validate.sigmas=[0]": "validate.sigmas: 0.0 must be above 0 and at most 1.",
    "validate.sigmas=[1.5]": "validate.sigmas: 1.5 must be above 0 and at most 1.",
    "validate.sigmas=[]": "validate.sigmas is empty",
    "extend.factor=null": "Neither frames nor extend.factor is set",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes_are_named_with_their_remedy(argument):
    message = refusal(TINY, argument)
    assert MISTAKES[argument] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["memory.recompute=none", "memory.offload=true"],
            "needs memory.recompute=all or all_but_a",
        ),
        (
            ["memory.recompute=all_but_attention", "sparse.backend=flex"],
            "use memory.recompute=all, or",
        ),
    ],
)
def test_memory_settings_that_do_not_go_together(arguments, message):
    assert message in refusal(TINY, *arguments)


def test_all_values_out_of_range_are_told_at_once():
    message = refusal(TINY, "lora.rank=0", "train.steps=-1", "sparse.block=3")
    assert "lora.rank=0" in message and "train.steps=-1" in message and "sparse.block=3" in message


@pytest.mark.parametrize(
    "argument, message",
    [
        (None, "recipe=NAME is missing. Recipes: "),
        ("recipe=", "recipe=NAME is missing. Recipes: "),
        ("recipe=tiny_wann", "recipe=tiny_wann is unknown. Did you mean tiny_wan?"),
        ("recipe=../tiny_wan", "recipe=../tiny_wan: no such file. Recipes by name: "),
        ("recipe=mine.yaml", "recipe=mine.yaml: no such file. Recipes by name: "),
    ],
)
def test_a_recipe_that_is_not_there(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*filter(None, [argument]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("frames: [", "mine.yaml is not valid YAML: "),
        ("frames: 5\nframes: 6", "frames is given twice"),
        ("- frames", "mine.yaml must hold `key: value` lines."),
        ("", "mine.yaml must hold `key: value` lines."),
        ("frames: 5\ntrain:", "train is a group of settings: give one of train.steps"),
        ("frames: 5\nsparse: 3", "sparse is a group of settings"),
        ("frames: 5\ntrain: {stps: 3}", "train.stps is not a setting. Did you mean train.steps?"),
        ("frames: 5\ntrain: {steps: many}", "train.steps=many must be a whole number."),
        ("frames: 5\nsparse: {pattern: radial}", "sparse.pattern is a group of settings"),
        ("frames: 5\nsparse: {pattern: {name: 3}}", "sparse.pattern.name=3 is unknown. Known: de"),
        ("frames: 5\nsparse: {pattern: {name: [a]}}", "sparse.pattern.name=['a'] is unknown."),
        ("frames: 5\nvalidate: {prompts: one}", "validate.prompts=one must be a list of texts."),
        ("frames: 5\nvalidate: {prompts: }", "validate.prompts=null must be a list of texts."),
        ("frames: 5\nvalidate:\n  prompts:\n  - a: b\n", "an item with `: ` or brackets needs quo"),
        ("frames: !!python/object/apply:os.getcwd []", "must be a whole number, or null."),
    ],
)
def test_a_recipe_with_a_mistake(text, message, recipe):
    assert message in refusal(recipe(text))


def test_a_broken_recipe_is_not_mended_by_the_command_line(recipe):
    for text in ("frames: 5\nsparse: 3", "frames: 5\nsparse: {pattern: 3}"):
        assert "is a group of settings" in refusal(recipe(text), "sparse.pattern.name=dense")


def test_a_recipe_that_is_no_text(tmp_path):
    path = tmp_path / "film.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "film.yaml is not valid YAML: 'utf-8' codec" in refusal(f"recipe={path}")


# a command's own schema


@dataclasses.dataclass(frozen=True)
class Options:
    prompt: str = ""
    steps: int = 50
    dense: bool = False
    seed: int | None = None


def test_commands_parse_by_the_same_rules():
    got = parse(Options, ["prompt=a: b, ${c} [d]", "steps=4", "dense=true", "seed=null"])
    assert got == Options("a: b, ${c} [d]", 4, True, None)
    for wrong, message in (
        ("stps=3", "stps is not a setting. Did you mean steps?"),
        ("guidance=3", "guidance is not a setting. Known: prompt, steps, dense, seed."),
        ("steps=x", "steps=x must be a whole number."),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(Options, [wrong])
        assert str(caught.value) == message


# saving

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("\\${}'\": #a\n")
configs = st.builds(
    Config,
    recipe=texts,
    frames=st.integers(1, 10**6),
    fps=st.none() | st.integers(1, 120),
    sparse=st.builds(
        Sparse,
        pattern=st.just(Dense())
        | st.builds(Radial, decay=st.floats(1e-9, 1e9), sink=st.booleans(), near=st.integers(1, 9))
        | st.just(SlidingTile(windows="3x1x1, 3x3x1"))
        | st.sampled_from([cls() for cls in PATTERNS.values()]),
        block=st.sampled_from([16, 32, 64, 128]),
        density=st.none() | st.floats(0, 1, exclude_min=True),
        dense_layers=st.integers(0, 99) | st.sets(st.integers(-9, 9)).map(sorted),
        dense_steps=st.integers(0, 99) | st.sets(st.integers(-9, 9)).map(sorted),
    ),
    rope=st.just(Rope())
    | st.just(Rope("interpolate"))
    | st.builds(Rope, st.just("riflex"), k=st.none() | st.integers(1, 99)),
    validate=st.builds(
        Validate,
        prompts=st.lists(texts, max_size=3),
        sigmas=st.lists(st.floats(1e-9, 1), min_size=1, max_size=3),
        guidance=st.floats(-1e12, 1e12),
    ),
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(configs)
@example(Config(recipe="null", frames=5, validate=Validate(prompts=["null", "~", "", "yes"])))
def test_a_saved_config_loads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save(config, path)
    assert load_file(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]
    assert config_hash(load_file(path)) == config_hash(config)


def test_a_config_from_before_a_setting_was_there_loads_with_its_default(tmp_path):
    path = tmp_path / "config.yaml"
    config = load([TINY])
    plain = to_dict(config)
    del plain["sparse"]["density"]
    path.write_text(yaml.safe_dump(plain))
    assert load_file(path) == config


def test_saving_replaces_whole_files(tmp_path):
    path = tmp_path / "config.yaml"
    save(load([TINY]), path)
    save(load([TINY, "train.steps=40"]), path)
    assert load_file(path).train.steps == 40
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_saved_config_is_a_recipe_too(tmp_path):
    path = tmp_path / "again.yaml"
    save(load([TINY, "sparse.pattern.decay=0.5"]), path)
    config = load([f"recipe={path}", "train.steps=40"])
    assert (config.recipe, config.train.steps) == ("again", 40)
    assert config.sparse.pattern == Radial(decay=0.5)


def test_plain_values_are_plain():
    plain = to_dict(load([TINY]))
    assert json.loads(json.dumps(plain)) == plain == yaml.safe_load(yaml.safe_dump(plain))
    assert plain["sparse"]["pattern"]["name"] == "radial"


def test_the_hash_names_a_config():
    one = config_hash(load([TINY]))
    assert len(one) == 12 and int(one, 16) >= 0
    assert config_hash(load([TINY, "train.steps=80"])) == one  # as in the recipe
    others = ["train.steps=101", "sparse.pattern.decay=0.5", "sparse.pattern.name=dense"]
    assert len({one, *(config_hash(load([TINY, other])) for other in others)}) == 4


def test_the_hash_is_the_same_in_another_process():
    script = f"from longreel.trainer.config.recipe import *; print(config_hash(load([{TINY!r}])))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == config_hash(load([TINY]))


def test_the_default_run_folder_is_named_after_the_recipe():
    assert str(load([TINY]).run_dir) == "runs/tiny_wan"
    assert str(load([TINY, "run.dir=/data/a=b"]).run_dir) == "/data/a=b"
    assert "tiny_wan" in recipe_names()
