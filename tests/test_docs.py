"""Hold documents to the code, where a test can tell."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longreel.sparse.patterns import PATTERNS
from longreel.trainer.config.renamed import KEYS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the lines of markdown tables by the name in the first."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in line.split("|")] for name, line in found}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_table_of_patterns_has_each_with_its_parameters_and_width(name):
    table, _, rest = PAGE.partition("## What was chosen")
    _, parameters, _ = rows(table)[name]
    fields = dataclasses.fields(PATTERNS[name])
    said = dict(re.findall(r"`(\w+)=([^`]*)`", parameters))
    defaults = {field.name: str(field.default) for field in fields}
    assert said == {key: {"True": "true"}.get(text, text) for key, text in defaults.items()}
    assert re.findall(r"`(\w+)=[^`]*`\\\*", parameters) == [PATTERNS[name].width][: len(fields)]
    assert name in rows(rest.partition("<!-- widths -->")[0])  # densities, from the benchmark


def test_the_readme_names_every_pattern():
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "| patterns |" in line
    )
    assert re.findall(r"`(\w+)`", row)[: len(PATTERNS)] == list(PATTERNS)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def python_blocks(page: str, *, before: str = "", after: str = "") -> str:
    """The python examples of a page as one program, between two of its headings.

    Blocks marked `notest` need what a test has not, such as a published model.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert before in text and after in text
    text = text[text.index(after) : text.index(before) if before else None]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def test_the_examples_of_the_python_api_without_a_model_run():
    exec(compile(python_blocks("python.md", before="## Train\n"), "docs/python.md", "exec"), {})


@pytest.mark.slow
def test_all_examples_of_the_python_api_run(tmp_path):
    """They run in a process of their own, as a reader's, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", python_blocks("python.md")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def literals():
    """Every string that the code writes, with a gap where a value is put in."""
    for folder in ("kernels", "sparse", "data", "trainer", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    """Each part between `...` of a message stands in a string of the code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^- `(.+)`$", page, re.MULTILINE)
    assert len(messages) > 40
    written = "\n".join(literals())
    unknown = [
        part for text in messages for part in text.split("...") if part.strip() not in written
    ]
    assert not unknown


def test_the_changelog_has_every_renamed_key():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.findall(r"^ *\| `(\w+\.\w+)` \| `(\w+\.\w+)` \|$", text, re.MULTILINE)
    assert dict(found) == KEYS


def test_pages_give_settings_by_the_names_of_today():
    """Only the changelog knows the old ones, and results of a day keep the commands of that day."""
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
    pages.remove("docs/settings.md")  # it has the table of renamed keys
    pages += [f"recipes/{p.name}" for p in ROOT.glob("recipes/*.yaml")]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        old = {key for key in KEYS if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text)}
        assert not old, page


def test_imports_that_documents_gave_before_still_work():
    """Scripts have them from README and docs/rope.md of 69929e4."""
    from longreel.trainer import adapter, sampling
    from longreel.trainer.adapter.lora import read_entry
    from longreel.trainer.lora import read_entry as read_entry_of_before

    assert read_entry_of_before is read_entry is adapter.read_entry
    assert callable(sampling.load_pipeline) and callable(sampling.apply_rope)
