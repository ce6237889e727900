"""Write the page of results: tables, findings, and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longreel.data.files import replacing
from longreel.sparse.patterns import PATTERNS

from . import attention
from .cells import MAIN, question_cells
from .controls import checks
from .results import Interval, Result, Store, difference, interval
from .settings import Scale

PAGE = Path(__file__).parents[2] / "docs" / "length_extension.md"


@dataclass(frozen=True)
class Column:
    """Holds a figure of the tables. better: 1 if higher values are better, -1 if lower."""

    task: str
    metric: str
    title: str
    better: int


COLUMNS = (
    Column("occlude", "ends", "occlude: same colour after the gap", 1),
    Column("cross", "ends", "cross: same colour at both ends", 1),
    Column("bounce", "ends", "bounce: same colour at both ends", 1),
    Column("bounce", "trajectory_rmse", "bounce: path RMSE", -1),
    Column("spin", "angular_speed_error", "spin: speed error", -1),
    Column("pan", "loop_gap", "pan: loop PSNR far - near, dB", 1),
    Column("occlude", "visible", "occlude: objects visible", 1),
)
CANNOT = (
    "What this cannot tell: anything about looks, about real video, or about models a thousand "
    "times larger that trained for longer. Rows of one seed have intervals of clips alone, which "
    "leave out how training varies. Identity is told of samples that show an object: read it with "
    "the column of visible objects."
)


def write(store: Store, scale: Scale, out: Path, path: Path = PAGE) -> Path:
    """Fill the marked places of the page from all available results."""
    text = path.read_text(encoding="utf-8")
    for name, body in (
        ("findings", findings(store, scale)),
        ("results", results(store, scale, out)),
    ):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"{path} has no place for {name}"
        text = f"{before}{begin}{body}\n{end}{after}"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def findings(store: Store, scale: Scale) -> str:
    """Return the first paragraph: radial against dense and the window, with intervals."""
    failed = [check.name for check in checks(store, scale) if not check.passed]
    sentences = []
    if failed:
        sentences.append(f"**Not to be believed yet**: it does not hold that {'; '.join(failed)}.")
    for factor in (4, 2):
        for other in ("dense", "spatial"):
            radial, against = store.of_row("radial", factor), store.of_row(other, factor)
            if radial and against:
                sentences.append(_comparison(radial, against, other, factor))
    if len(sentences) == len(failed[:1]):
        return "Not run yet: `python benchmarks/extend.py dry=true` says what it takes."
    return " ".join([*sentences, CANNOT])


def _comparison(radial: list[Result], against: list[Result], other: str, factor: int) -> str:
    words = []
    for column in COLUMNS:
        value = difference(radial, against, column.task, column.metric)
        if value is None:
            continue
        sure = value.low > 0 or value.high < 0
        verdict = "no difference seen in"
        if sure:
            verdict = "better" if value.mean * column.better > 0 else "worse"
        words.append(f"{verdict} {column.title} ({value})")
    seeds = min(len(radial), len(against))
    return (
        f"At {factor}x a radial LoRA against {'the window' if other == 'spatial' else 'dense'} "
        f"({seeds} seed{'s' * (seeds > 1)}): {'; '.join(words)}."
    )


def results(store: Store, scale: Scale, out: Path) -> str:
    return "\n\n".join(_sections(store, scale, out))


def _sections(store: Store, scale: Scale, out: Path) -> Iterator[str]:
    yield "## Controls"
    marks = {True: "holds", False: "**fails**", None: "not yet"}
    lines = ["| control | | what was found |", "|---|---|---|"]
    lines += [f"| {c.name} | {marks[c.passed]} | {c.found} |" for c in checks(store, scale)]
    yield "\n".join(lines)
    base = _row(store, "base", 1)
    if base:
        yield "The base at its native length:\n\n" + _table([base])
    for factor in (4, 2):
        yield f"## {factor} times the native length, {scale.frames(factor)} frames"
        rows = [_row(store, row, factor) for row in MAIN]
        yield "Same steps:\n\n" + _table(rows)
        rows = [_row(store, "radial", factor)]
        rows += [_row(store, row, factor, "seconds") for row in MAIN[1:3]]
        yield "Same GPU seconds as radial's steps took:\n\n" + _table(rows)
        rows = [_row(store, row, factor) for row in PATTERNS if row not in MAIN]
        yield "Every other pattern:\n\n" + _table(rows)
        names = dict.fromkeys(c.row for c in question_cells() if c.factor == factor)
        rows = [_row(store, row, factor) for row in names]
        yield "All weights, RoPE, dense layers, densities:\n\n" + _table(rows)
    analysis = attention.section(out / "analysis")
    if analysis:
        yield "## What the trained models attend to, and what masks leave of it"
        yield analysis
    figures = sorted((PAGE.parent / "length_extension").glob("*"))
    if figures:
        yield "## Curves and samples"
        yield "\n\n".join(f"![{path.stem}](length_extension/{path.name})" for path in figures)
    yield _made_on(store)


def _row(store: Store, row: str, factor: int, mark: str = "steps") -> list[str] | None:
    found = store.of_row(row, factor, mark)
    if not found:
        return None
    one = found[0]
    trained = (
        f"{one.train['step']} in {one.train['seconds']:.0f} s" if one.train["step"] else "none"
    )
    cells = [f"`{row}`", str(len(found)), f"{one.density:.1%}", trained]
    for column in COLUMNS:
        cells.append(_shown(interval(found, column.task, column.metric)))
    return cells


def _shown(value: Interval | None) -> str:
    if value is None:
        return "-"
    rare = f", of {value.told:.0%}" if value.told < 0.995 else ""
    return f"{value.mean:.3g} ({value.low:.3g} to {value.high:.3g}{rare})"


def _table(rows: Sequence[list[str] | None]) -> str:
    """Return a Markdown table; rows without results are left out."""
    head = ["row", "seeds", "density", "steps, GPU time", *(column.title for column in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows if row]
    return "\n".join(lines) if len(lines) > 2 else "not run yet"


def _made_on(store: Store) -> str:
    """Name the machines on which the results were measured."""
    loaded = [store.load(path.stem) for path in sorted(store.folder.glob("*.json"))]
    if not loaded:
        return "Nothing has been measured yet."
    return "Measured on " + "; ".join(sorted({r.about["measured_on"] for r in loaded if r})) + "."
