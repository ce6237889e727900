"""The architecture: which folder may import which, and what a bare machine can import."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imports point down: kernels <- sparse <- trainer -> data, and launch on top.
MAY_IMPORT = {
    "kernels": set(),
    "sparse": {"kernels"},
    "data": set(),
    "trainer": {"kernels", "sparse", "data"},
    "launch": {"sparse", "data", "trainer"},
    "recipes": set(),
}
# The layers that know nothing of models import no model library either.
THIRD_PARTY = {
    "kernels": {"torch", "triton", "flash_attn"},
    "sparse": {"torch", "matplotlib"},
    "data": {"torch", "numpy", "safetensors", "av", "datasets", "pyarrow"},
}
MOST_LINES = 500
# The rooms of trainer/, each of which may import those in the lines above it. Files directly in
# trainer/ are rooms of their own.
ROOMS = (
    {"config"},
    {"families", "memory", "optimizer"},
    {"adapter"},
    {"run", "flow"},
    {"parallel"},
    {"job"},
    {"plan", "sampling", "clips", "summary"},
    {"analysis", "step"},
    {"loop"},
)
MOVED = {"lora"}  # names that documents gave before, which lead to where things are now
MOST_FILES = 9  # directly in trainer/


def modules():
    return [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path, text=None):
    """Absolute names of all that a file imports, anywhere in it; ours begin with `longreel.`."""
    package = ["longreel", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_imports_are_seen_wherever_they_stand():
    """The reader that the tests below rely on."""
    text = """
import os.path
from ..kernels import block_sparse
from ..kernels.block_sparse import op
from . import layout
if True:
    from .. import data
def later():
    import longreel.trainer.loop
    from .patterns.radial import Radial
"""
    assert set(imported(ROOT / "sparse" / "some.py", text)) == {
        "os.path",
        "longreel.kernels.block_sparse",
        "longreel.kernels.block_sparse.op",
        "longreel.sparse.layout",
        "longreel.data",
        "longreel.trainer.loop",
        "longreel.sparse.patterns.radial.Radial",
    }
    deeper = imported(ROOT / "sparse" / "patterns" / "some.py", "from ..grid import TokenGrid")
    assert list(deeper) == ["longreel.sparse.grid.TokenGrid"]


def test_every_folder_is_known():
    assert {path.parent.relative_to(ROOT).parts[0] for path in modules()} == set(MAY_IMPORT) - {
        "recipes"
    }
    with_code = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}  # hidden ones are not ours
    assert with_code <= set(MAY_IMPORT) | {"longreel", "tests", "benchmarks", "build"}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder):
    for path in (ROOT / folder).rglob("*.py"):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("longreel.")}
        assert ours <= MAY_IMPORT[folder] | {folder}, path


def test_rooms_of_the_trainer_import_down():
    floor = {room: index for index, rooms in enumerate(ROOMS) for room in rooms}
    files = [path for path in modules() if path.relative_to(ROOT).parts[0] == "trainer"]
    rooms = {path: path.relative_to(ROOT / "trainer").with_suffix("").parts[0] for path in files}
    assert set(rooms.values()) - MOVED == set(floor)
    for path, room in rooms.items():
        names = [name.split(".") for name in imported(path) if name.startswith("longreel.trainer.")]
        others = {parts[2] for parts in names} - {room}
        up = {other for other in others if floor[other] >= floor.get(room, len(ROOMS))}
        assert not up, path


def test_no_two_files_import_each_other():
    """Directly or around a corner, imports inside functions and for type checkers included."""
    names = {
        ".".join(["longreel", *p.relative_to(ROOT).with_suffix("").parts]): p for p in modules()
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}

    def needed(path):
        for name in imported(path):
            parents = [name, name.rpartition(".")[0]]
            yield from (names[parent] for parent in parents if parent in names)

    graph = {path: {other for other in needed(path) if other != path} for path in names.values()}
    for path, others in graph.items():  # a package that gathers names is no part of a circle
        graph[path] = {o for o in others if o.name != "__init__.py" or o.parent != path.parent}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(str(path.relative_to(ROOT)) for path in error.args[1])
        raise AssertionError(circle) from None


def test_the_trainer_has_few_files_outside_of_its_rooms():
    assert len(list((ROOT / "trainer").glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_of_our_own_are_relative(folder):
    """Type checkers and editors follow these from a bare checkout."""
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) longreel\b", text, re.MULTILINE), path


@pytest.mark.parametrize("folder", THIRD_PARTY)
def test_lower_layers_know_no_model_library(folder):
    ours = {"longreel"} | sys.stdlib_module_names
    for path in (ROOT / folder).rglob("*.py"):
        foreign = {name.split(".")[0] for name in imported(path)} - ours
        assert foreign <= THIRD_PARTY[folder], path


def test_no_torchvision():
    """Its builds must match torch's to the digit; PyAV and Pillow do what is needed."""
    for path in modules():
        assert "torchvision" not in {name.split(".")[0] for name in imported(path)}, path


def test_files_stay_readable():
    """The tests and the benchmarks too."""
    folders = [*MAY_IMPORT, "tests", "benchmarks"]
    paths = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*.py"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert Path(__file__) in lengths
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


def python(script, *, cwd=ROOT, **environment):
    """Run a script in a new interpreter that starts in `cwd`, as `python -c` does."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.long
def test_every_module_can_be_imported_first():
    """Each in a process of its own, forked from one that has imported no module of ours."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in modules()]
    names = [".".join(["longreel", *path.parts]).removesuffix(".__init__") for path in paths]
    script = f"""
import gc, importlib, os, sys, traceback

def in_a_child(work):
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        try:
            os.write(write, work().encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    return None if os.wait()[1] else text

def import_all():
    for name in names:
        importlib.import_module(name)
    return " ".join(name for name in sys.modules if not name.startswith("longreel"))

names = {names!r}
for name in in_a_child(import_all).split():  # what is not ours is imported once for all children
    try:
        importlib.import_module(name)
    except Exception:
        pass
assert not any(name.startswith("longreel") for name in sys.modules)
gc.disable()  # a collection in a child would copy all of the pages that it shares
gc.freeze()
def alone(name):
    importlib.import_module(name)
    return ""
print(*[name for name in names if in_a_child(lambda: alone(name)) is None])
"""
    assert python(script) == ""


def test_top_folders_hold_no_init():
    assert [path for folder in MAY_IMPORT for path in ROOT.glob(f"{folder}/__init__.py")] == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_top_folders_hide_no_installed_package(folder, tmp_path):
    """An installed `kernels` is imported from the repository's root too, by diffusers for one."""
    installed = tmp_path / folder
    installed.mkdir()
    (installed / "__init__.py").touch()
    script = f"import sys; assert sys.path[0] == ''; import {folder}; print({folder}.__file__)"
    assert python(script, PYTHONPATH=str(tmp_path)) == str(installed / "__init__.py")


def blocked(*names):
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def test_training_from_a_ready_cache_needs_no_decoder():
    python(
        blocked("av", "datasets")
        + """
import longreel.data.dataset, longreel.data.sampler, longreel.trainer.loop
try:
    import longreel.data.decode
except ImportError:
    pass
else:
    raise AssertionError("the block does not work")
"""
    )


def test_kernels_and_sparse_work_without_triton():
    script = """
import torch
from longreel.kernels.block_sparse import resolve_backend
from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Radial
grid = TokenGrid(4, 4, 4)
q, k, v = (torch.randn(1, len(grid), 1, 16, requires_grad=True) for _ in range(3))
attention = SparseAttention(Radial(), block=16)
attention.plan(grid)
attention.attention(0, q, k, v).sum().backward()
assert q.grad.abs().sum() > 0
print(resolve_backend("auto", q.device, q.dtype, 16))
"""
    assert python(blocked("triton") + script) == "reference"


def test_reading_a_recipe_imports_no_model_library():
    """A typo on the command line is told in a moment."""
    script = """
import sys
from longreel.trainer.config.recipe import load
load(["recipe=tiny_wan"])
print(*({"diffusers", "transformers", "peft", "accelerate", "av", "triton"} & set(sys.modules)))
"""
    assert python(script) == ""


# First words of sentences that have no subject and no verb.
FRAGMENTS = {"What", "Of", "Whether", "As", "How", "By", "For", "From", "Where", "Without"}


def test_docstrings_begin_with_a_sentence():
    """A docstring's first sentence has a subject and a verb, or is an imperative (CONTRIBUTING)."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    folders = [*MAY_IMPORT, "longreel", "tests", "benchmarks"]
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
            first = (ast.get_docstring(node) or "-").split()[0]
            assert first not in FRAGMENTS, f"{path}:{getattr(node, 'lineno', 1)}"
