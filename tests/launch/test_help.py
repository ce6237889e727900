"""Hold what `longreel` says of itself, and how soon."""

import importlib
import subprocess
import sys

import pytest

import longreel
from longreel.launch.commands import COMMANDS, main
from longreel.trainer.config.fields import settings_of
from longreel.trainer.config.recipe import load, load_file, recipe_names
from longreel.trainer.config.reference import documented_settings

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "av", "wandb"}


def options_of(command):
    module = importlib.import_module(f"longreel.launch.{command}_command")
    schemas = module.OPTIONS if isinstance(module.OPTIONS, dict) else {"": module.OPTIONS}
    return [key for schema in schemas.values() if schema for key in settings_of(schema)]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(argv, capsys):
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    for command, summary in COMMANDS.items():
        assert any(line.split() == [command, *summary.split()] for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_keys(command, capsys):
    main([command, "anything", "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"longreel {command}") and COMMANDS[command] in text
    for option in options_of(command):
        assert f"\n{option.key}=" in text and option.text.split()[0] in text
        assert option.text.endswith("."), option.key


def test_an_unknown_command_is_told_with_the_known_ones():
    with pytest.raises(SystemExit, match="'smaple' is no command"):
        main(["smaple"])


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"longreel {longreel.__version__}\n"


def test_help_imports_nothing_heavy():
    """It answers at once: importing torch alone takes seconds."""
    script = f"""
import sys
from longreel.launch.commands import COMMANDS, main
main(["--help"])
for command in COMMANDS:
    main([command, "--help"])
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_settings_are_found_by_key_by_text_and_by_an_old_name(capsys):
    def found(*words):
        main(["settings", *words])
        lines = capsys.readouterr().out.splitlines()
        return [line.partition("=")[0] for line in lines if line and line[0] != " "]

    assert found() == [setting.key for setting in documented_settings()]
    assert found("max_grad") == ["train.max_grad_norm"]
    assert found("train.clip") == ["train.max_grad_norm"]
    assert "memory.recompute" in found("checkpointing")
    with pytest.raises(SystemExit, match="No setting has 'recompte'.* Did you mean"):
        main(["settings", "recompte"])
    with pytest.raises(SystemExit, match="takes one word, not 2"):
        main(["settings", "two", "words"])


def test_a_printed_config_is_the_config(tmp_path, capsys):
    given = ["recipe=wan_1_3b_2x", "train.steps=700", "sparse.density=0.3"]
    main(["config", *given])
    saved = tmp_path / "config.yaml"
    saved.write_text(capsys.readouterr().out)
    printed = load_file(saved)
    assert printed.train == load(given).train
    assert (printed.frames, printed.fps, printed.extend.native) == (161, 16, 81)
    assert printed.model.path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_every_published_recipe_is_listed(capsys):
    main(["recipes"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = [row[0] for row in rows if row and row[0] in recipe_names()]
    assert listed == [name for name in recipe_names() if not name.startswith("tiny_")]
    (row,) = [row for row in rows if row and row[0] == "hunyuan_4x"]
    assert row[1:4] == ["125", "->", "509"] and "461,056" in row
