"""Every recipe that ships."""

import pytest
import yaml

from longreel.trainer.config.recipe import RECIPES, load, load_file, recipe_names, save
from longreel.trainer.families import FAMILIES


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name, tmp_path):
    config = load([f"recipe={name}"])
    assert config.recipe == name
    assert config.family in FAMILIES
    save(config, tmp_path / "config.yaml")
    assert load_file(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_says_what_it_is(name):
    """A header comment with the command that runs it, then nothing but settings."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and len(header) >= 3
    assert any(f"recipe={name} " in line for line in header)
    assert "recipe" not in yaml.safe_load(text)  # the file's name is the recipe's


def test_the_tiny_recipe_ships():
    assert "tiny_wan" in recipe_names()
