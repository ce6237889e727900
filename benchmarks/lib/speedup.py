"""The step benchmark's results: kept as numbers, written as tables, ratios and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from longreel.data.files import replacing
from longreel.trainer.plan.estimate import GIB

from .blocks import Counts, Design, describe
from .parts import BUSY, COPIES, IDLE, PARTS, Profile
from .report import short, with_sections, write
from .rows import Point

# Seconds per step that earlier runs measured on this GPU, by recipe and row. A run whose dense rows
# differ from these compares our rows with something else.
KNOWN_ON = "NVIDIA H200"
KNOWN = {"hunyuan_2x": {"stock": 537.0, "dense": 344.0}}
MARGIN = 0.05
TOP = 15  # kernels
TOP_ROWS = ("fair", "radial")
OVERS = (("radial", "fair"), ("radial", "dense"), ("radial", "stock"), ("sparse", "fair"))
WHOLE = " whole"  # ends the name of a row whose model was run whole
COLUMNS = (
    "row",
    "s/step",
    "predicted s",
    "tokens/s",
    "peak GiB",
    *(f"{part} s" for part in PARTS),
    "s a block",
    "steps",
)
NOTES = (
    "s/step: of one optimizer update of one clip, without accumulation; the median of so many "
    "steps as the last column says, in which rows and their models of few blocks took turns. "
    "Extrapolated where the row says so: each kind of block at its difference, everything else "
    "once. Predicted: by the plan. Peak: what torch allocated, extrapolated likewise, however much "
    "the GPU has; under memory.offload further blocks add weights alone. Parts: kernels of one "
    f"profiled step, the first; {', '.join(BUSY)} follow each other, {IDLE} is the time in which "
    "no kernel ran (extrapolated below zero: what the smallest model's profiled step lost), "
    f"{COPIES} run beside kernels. fp32 matmul: the adapter's. optimizer: also the gradient's norm."
)


@dataclass
class Record:
    """Holds one row of one recipe.

    about: the row in words. command: reproduces the row. frames: pixel frames. predicted: seconds
    of a step of the whole model, by the plan. complaint: why it was not measured; empty if it was.
    """

    about: str
    command: str
    family: str
    frames: int
    tokens: int
    density: float
    offload: bool
    whole: Counts
    low: int
    high: int
    predicted: float | None = None
    complaint: str = ""
    points: list[Point] = field(default_factory=list)

    @property
    def design(self) -> Design:
        return Design(self.whole, self.low, self.high)

    @property
    def steps(self) -> int:
        """Return the number of steps counted at every point."""
        return min((len(point.seconds) for point in self.points), default=0)

    @property
    def seconds(self) -> float | None:
        return self.design.total([p.median for p in self.points]) if self._done else None

    @property
    def per_block(self) -> dict[str, float]:
        return self.design.per_block([p.median for p in self.points]) if self._done else {}

    @property
    def peak(self) -> float | None:
        """Return the peak in bytes; under offloading, further blocks add only their weights."""
        if not self._done or not self.points[0].peak:
            return None
        if not self.offload:
            return self.design.total([p.peak for p in self.points])
        first = self.points[0]
        return self.design.total([p.held for p in self.points]) + first.peak - first.held

    @property
    def parts(self) -> dict[str, float] | None:
        """Return the seconds by part; None without profiles."""
        profiles = self._profiles
        if not profiles:
            return None
        return {part: self.design.total([p.parts[part] for p in profiles]) for part in PARTS}

    def kernels(self) -> list[tuple[str, str, float, float]]:
        """Return label, part, runs and seconds of all kernels, the longest first."""
        none, found, profiles = ("", 0, 0.0), [], self._profiles
        for label in {label for p in profiles for label in p.kernels}:
            each = [p.kernels.get(label, none) for p in profiles]
            part = next(part for part, _, _ in each if part)
            runs, seconds = (self.design.total([x[i] for x in each]) for i in (1, 2))
            found.append((label, part, runs, seconds))
        return sorted(found, key=lambda kernel: -kernel[3])

    @property
    def _done(self) -> bool:
        return not self.complaint and self.steps > 0

    @property
    def _profiles(self) -> list[Profile]:
        profiles = [point.profile for point in self.points if point.profile is not None]
        return profiles if self._done and len(profiles) == len(self.points) else []


@dataclass
class Section:
    """Holds one recipe's results. check: the correctness check in words. rows: by name."""

    check: str = ""
    rows: dict[str, Record] = field(default_factory=dict)


@dataclass
class Results:
    """Holds all results of one machine and day; setup: what they have in common."""

    setup: str
    sections: dict[str, Section] = field(default_factory=dict)


def read(path: Path, setup: str) -> Results:
    """Read the results to continue; empty if there are none yet.

    Raises:
        SystemExit: if it is of another setup.
    """
    if not path.exists():
        return Results(setup)
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["setup"] != setup:
        raise SystemExit(
            f"error: {path} was measured with another setup.\n"
            f"there: {held['setup']}\nhere:  {setup}"
        )
    sections = {
        name: Section(section["check"], {k: _record(row) for k, row in section["rows"].items()})
        for name, section in held["sections"].items()
    }
    return Results(setup, sections)


def save(results: Results, path: Path, title: str) -> None:
    """Write the numbers to `path`, and the tables and plot made of them beside it."""
    drawn = path.with_suffix(".svg")
    head = [title, results.setup, NOTES]
    if draw(results, drawn):
        head.append(f"![seconds a step]({drawn.name})")
    sections = {name: described(name, s, results.setup) for name, s in results.sections.items()}
    write(path.with_suffix(".md"), with_sections(head, sections))
    write(path, json.dumps(asdict(results), default=list) + "\n")


def described(recipe: str, section: Section, setup: str) -> str:
    """Return a recipe's table, ratios and kernels in Markdown."""
    rows = section.rows
    table = [f"| {' | '.join(COLUMNS)} |", f"|{len(COLUMNS) * '---|'}"]
    table += [line(name, row) for name, row in rows.items()]
    first = next(iter(rows.values()))
    shape = f"{first.frames} frames, {first.tokens:,} tokens."
    tops = [
        f"The kernels that take longest in `{name}`:\n\n{top(row)}"
        for name, row in rows.items()
        if name.removesuffix(WHOLE) in TOP_ROWS and row.kernels()
    ]
    about = "\n".join(
        f"- {n}: {row.about}; {made(row)}.{longest(row)} {row.command}" for n, row in rows.items()
    )
    told = [shape, section.check, "\n".join(table), ratios(rows), verdict(recipe, rows, setup)]
    return "\n\n".join(filter(None, [*told, about, *tops]))


def line(name: str, row: Record) -> str:
    peak, parts = row.peak, row.parts
    cells = [
        name,
        row.complaint.replace("|", "/") or short(row.seconds),
        short(row.predicted),
        "-" if row.seconds is None else f"{row.tokens / row.seconds:,.0f}",
        short(peak and peak / GIB),
        *("-" if parts is None else short(parts[part]) for part in PARTS),
        ", ".join(f"{kind} {short(value)}" for kind, value in row.per_block.items()) or "-",
        str(row.steps),
    ]
    return f"| {' | '.join(cells)} |"


def made(row: Record) -> str:
    """Describe how much of a row was measured and how much extrapolated."""
    design = f"the model whole, {describe(row.whole)}"
    if row.high:
        design = f"extrapolated from {row.low} and {row.high} of each to {describe(row.whole)}"
    return f"density {row.density:.3f}, {design}"


def longest(row: Record) -> str:
    """Name the kernel that takes longest in a row; empty where none was profiled."""
    found = row.kernels()[:1]
    return "".join(f" Longest kernel: {label.partition(' | ')[0]}." for label, *_ in found)


def ratios(rows: Mapping[str, Record]) -> str:
    """List the speed ratios of steps, and of blocks that differ only in attention."""
    found = []
    for ending in ("", WHOLE):
        for fast, slow in OVERS:
            ours, theirs = rows.get(fast + ending), rows.get(slow + ending)
            if ours and theirs and ours.seconds and theirs.seconds:
                found.append(
                    f"- {fast} over {slow}{ending}: {theirs.seconds / ours.seconds:.2f}x "
                    f"({made(ours)})"
                )
    sparse = {}
    for name in ("sparse", "radial"):  # radial last: its blocks are the recipe's own
        sparse |= rows[name].per_block if name in rows else {}
    dense = rows["fair"].per_block if "fair" in rows else {}
    blocks = {
        kind: dense[kind.replace("sparse", "dense")] / seconds
        for kind, seconds in sparse.items()
        if kind.endswith("sparse") and kind.replace("sparse", "dense") in dense
    }
    if blocks:
        found.append(
            "- one sparse block over a dense one of `fair`: "
            + ", ".join(f"{kind.split()[0]} {ratio:.2f}x" for kind, ratio in blocks.items())
        )
    return "\n".join(found)


def verdict(recipe: str, rows: Mapping[str, Record], setup: str) -> str:
    """Say whether the dense rows run at their known speed; empty where it is not known."""
    if not setup.startswith(KNOWN_ON):
        return ""
    found = []
    # The dense rows do not depend on the settings given after a recipe's name.
    for name, known in KNOWN.get(recipe.partition(" ")[0], {}).items():
        seconds = rows[name].seconds if name in rows else None
        if seconds is not None:
            within = "within" if abs(seconds - known) <= MARGIN * known else "not within"
            found.append(
                f"{name} takes {short(seconds)} s, {within} {MARGIN:.0%} of the {known:g} s known."
            )
    return " ".join(found)


def top(row: Record) -> str:
    """Return a table of the kernels that take longest, extrapolated as the row is."""
    total = row.seconds or 0.0
    titles = ("kernel", "op", "inputs", "part", "runs", "s", "of the step")
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * '---|'}"]
    for label, part, runs, seconds in row.kernels()[:TOP]:
        cells = [*label.split(" | "), part, f"{runs:.0f}", short(seconds), f"{seconds / total:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> bool:
    """Draw seconds per step against frames as SVG; return False if there is nothing to draw.

    There is one line for dense and one for radial per family, each with its fastest settings.
    """
    lines: dict[str, dict[int, float]] = {}
    for section in results.sections.values():
        for name, label in (("fair", "dense"), ("radial", "radial")):
            for row in (section.rows.get(name + ending) for ending in ("", WHOLE)):
                if row and row.seconds:
                    line = lines.setdefault(f"{row.family}, {label}", {})
                    line[row.frames] = min(row.seconds, line.get(row.frames, row.seconds))
    if not lines:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, seconds in lines.items():
        frames = sorted(seconds)
        style = "s--" if ", dense" in label else "o-"
        axes.plot(frames, [seconds[x] for x in frames], style, label=label)
    axes.set(yscale="log", xlabel="frames", ylabel="seconds a step")
    axes.legend()
    with replacing(path) as unfinished, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(unfinished, format="svg", metadata={"Date": None})
    return True


def _record(held: Mapping[str, Any]) -> Record:
    points = []
    for point in held["points"]:
        found = point["profile"]
        profile = found and Profile(found[0], {k: tuple(v) for k, v in found[1].items()})
        points.append(Point(**point | {"profile": profile}))
    return Record(**held | {"points": points})
