"""Settings under the names that they had before."""

import dataclasses
import logging

import pytest

from longreel.trainer.config.fields import settings_of
from longreel.trainer.config.recipe import load, load_file
from longreel.trainer.config.renamed import KEYS, VALUES
from longreel.trainer.config.schema import Config
from longreel.trainer.config.values import ConfigError

TINY = "recipe=tiny_wan"
# A value of each renamed key that is not its default, as it was given and as it is read.
GIVEN = {
    "memory.checkpoint": ("attention", "all_but_attention"),
    "memory.fused_modulation": ("true", True),
    "memory.fused_norms": ("true", True),
    "memory.optimizer": ("adamw8bit", "adamw8bit"),
    "memory.probe": ("false", False),
    "train.accumulate": ("3", 3),
    "train.clip": ("0.5", 0.5),
    "validate.clips": ("2", 2),
}


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_the_table_leads_from_keys_that_are_gone_to_keys_that_are_there():
    settings = {setting.key: setting for setting in settings_of(Config)}
    assert not KEYS.keys() & settings.keys()
    assert set(KEYS.values()) | VALUES.keys() <= settings.keys()
    assert GIVEN.keys() == KEYS.keys()
    for key, (_, value) in GIVEN.items():
        assert settings[KEYS[key]].default != value


@pytest.mark.parametrize("old", KEYS)
def test_an_old_name_works_with_a_line_that_names_the_new_one(old, tmp_path, caplog):
    text, value = GIVEN[old]
    assert value_of(load([TINY, f"{old}={text}"]), KEYS[old]) == value
    assert f"{old}={text} is now {KEYS[old]}=" in caplog.text
    recipe = tmp_path / "mine.yaml"
    section, _, leaf = old.partition(".")
    recipe.write_text(f"frames: 5\n{section}: {{{leaf}: {text}}}\n")
    caplog.clear()
    assert value_of(load([f"recipe={recipe}"]), KEYS[old]) == value
    assert f"{recipe}: {old}={text} is now {KEYS[old]}=" in caplog.text


@pytest.mark.parametrize("old", KEYS)
def test_a_saved_run_loads_in_silence(old, tmp_path, caplog):
    text, value = GIVEN[old]
    section, _, leaf = old.partition(".")
    saved = tmp_path / "config.yaml"
    saved.write_text(f"recipe: tiny_wan\nframes: 5\n{section}: {{{leaf}: {text}}}\n")
    with caplog.at_level(logging.DEBUG):
        assert value_of(load_file(saved), KEYS[old]) == value
    assert not caplog.records


@pytest.mark.parametrize(
    ("once", "now"), [("true", "all"), ("False", "none"), ("full", "all"), ("all", "all")]
)
def test_recomputation_that_was_a_flag_keeps_its_meaning(once, now, tmp_path):
    for key in ("memory.checkpoint", "memory.recompute"):
        assert load([TINY, f"{key}={once}"]).memory.recompute == now


def test_both_names_at_once_are_refused():
    with pytest.raises(ConfigError, match="train.clip is the old name of train.max_grad_norm"):
        load([TINY, "train.clip=1", "train.max_grad_norm=2"])
    with pytest.raises(ConfigError, match="train.clip is the old name of train.max_grad_norm"):
        load([TINY, "train.max_grad_norm=2", "train.clip=1"])


def test_the_command_line_goes_before_a_recipe_that_has_the_old_name(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("frames: 5\ntrain: {clip: 0.5}\n")
    config = load([f"recipe={recipe}", "train.max_grad_norm=2"])
    assert config.train.max_grad_norm == 2
    assert config == dataclasses.replace(load([f"recipe={recipe}", "train.clip=2"]))
