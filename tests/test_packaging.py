"""Hold what `pip install` delivers."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ["kernels", "sparse", "trainer", "data", "recipes", "launch"]
PACKAGE = Path("longreel/__init__.py")  # the one file outside of them
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files_to_ship():
    """Code, recipes and launch configurations, as paths from the repository's root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path.relative_to(ROOT)
        for path in found
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    ]


def in_the_wheel(path):
    return path.as_posix() if path == PACKAGE else f"longreel/{path.as_posix()}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, built from a copy, because setuptools writes where it reads."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*files_to_ship(), PACKAGE, *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    run = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if not re.match(r"longreel-[^/]+\.dist-info/", name)}
    assert shipped == {in_the_wheel(path) for path in [*files_to_ship(), PACKAGE]}


def test_the_wheel_says_what_pyproject_says(wheel):
    project = PYPROJECT["project"]
    with zipfile.ZipFile(wheel) as archive:
        info = f"longreel-{project['version']}.dist-info/"
        metadata = archive.read(info + "METADATA").decode()
        assert f"Version: {project['version']}\n" in metadata
        assert "License-Expression: Apache-2.0\n" in metadata
        assert info + "licenses/LICENSE" in archive.namelist()
        scripts = archive.read(info + "entry_points.txt").decode()
    assert "longreel = longreel.launch.commands:main" in scripts


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    """The unpacked wheel alone is imported, in a folder where no checkout is in reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    modules = [
        ".".join(["longreel", *path.with_suffix("").parts])
        for path in files_to_ship()
        if path.suffix == ".py" and path.name != "__init__.py"
    ]
    script = f"""
import importlib, pathlib, sys
# Without site-packages' hook for an editable install, which would lead back to the checkout.
sys.path = [path for path in sys.path if "__editable__" not in path]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
for name in {modules!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(tmp_path)!r}), module
import longreel
assert longreel.__path__ == [str(pathlib.Path(longreel.__file__).parent)]
assert longreel.__version__ == {PYPROJECT["project"]["version"]!r}
from longreel.launch.commands import main
from longreel.trainer.config.recipe import load
print(callable(main), load(["recipe=tiny_wan"]).recipe)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True tiny_wan"


def test_packages_name_every_folder():
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent for path in files_to_ship()} | set(map(Path, FOLDERS))
    named = {".".join(["longreel", *folder.parts]) for folder in folders}
    assert set(setuptools["packages"]) == named | {"longreel"}
    where = {f"longreel.{folder}": folder for folder in FOLDERS}
    assert setuptools["package-dir"] == where | {"longreel": "longreel"}


def test_sub_packages_hold_an_init():
    folders = {path.parent for path in files_to_ship() if len(path.parts) > 2}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def canonical(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_constraints_pin_every_direct_dependency():
    project = PYPROJECT["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins if pin)
    pinned = {canonical(pin) for pin in pins if pin}
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {canonical(requirement) for requirement in direct} <= pinned


def test_pre_commit_runs_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = hooks["repos"]
    assert local["repo"] == "local"  # needs no network
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        assert f"$(BIN)/{hook['entry']}" in makefile
