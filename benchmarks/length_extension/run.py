"""Run the whole experiment cell by cell, skipping results that exist already.

Several calls may run at once, each on its own GPU: the first to reach a cell takes it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from lib.report import RESULTS, measured_on, write

from longreel.trainer.config.values import ConfigError

from . import estimate, figures, page
from .attention import ANALYSED, analyse
from .cells import Cell, plan, solved
from .clips import PRETRAINED, TRAINED, Bank
from .controls import checks
from .pixels import PixelWan
from .results import Result, Store, summary
from .sampling import sample, save_strip
from .settings import SCALES, SET_NAMES, Scale
from .training import OutOfTime, pretrain, tuned
from .workers import Workers


@dataclass(frozen=True)
class Options:
    """Holds the `key=value` options of benchmarks/extend.py.

    scale: full, or tiny for a CPU. out: folder of the base, results, and what runs resume from.
    only: rows or cells, with * and commas. seeds: of the main rows. seconds: time limit of a call,
    after which the next one can resume (0: none). dry: print only the estimated cost. page: fill
    docs/length_extension.md and benchmarks/results/length-extension.json from the existing results;
    `only` does nothing else.
    """

    scale: Literal["full", "tiny"] = "full"
    out: str = "runs/length_extension"
    only: str = "*"
    seeds: str = "0,1,2"
    seconds: float = 0.0
    dry: bool = False
    page: Literal["no", "too", "only"] = "no"


def run(options: Options) -> bool:
    """Return whether all requested cells are done. Raises ConfigError for invalid options."""
    scale, out = SCALES[options.scale], Path(options.out)
    if not all(text.strip().isdigit() for text in options.seeds.split(",")):
        raise ConfigError(f"seeds={options.seeds} must be numbers with commas between.")
    if options.seconds < 0:
        raise ConfigError(f"seconds={options.seconds} must not be negative; 0 means no limit.")
    cells = plan([int(text) for text in options.seeds.split(",")], options.only)
    if options.dry:
        print(estimate.table(cells, scale))
        return True
    store, done = Store(out), True
    if options.page == "only" and not summary(store):
        raise ConfigError(f"out={out} holds no results to fill the page with.")
    if options.page != "only":
        done = Experiment(scale, out, options.seconds).run(cells)
        for check in checks(store, scale):
            print({True: "holds:", False: "FAILS:", None: "open:"}[check.passed], check.name)
            print(f"    {check.found}")
    if options.page != "no":
        figures.draw(store, scale, out / "strips", page.PAGE.with_suffix(""))
        print(page.write(store, scale, out))
        path = RESULTS / "length-extension.json"
        write(path, json.dumps(summary(store), indent=1) + "\n")
        print(path)
    return done


WAIT = 5.0  # seconds, before looking again whether another call is done with a cell


class AtWork(Exception):
    """Raised when another call is working on a cell, or on one that it depends on."""


class Experiment:
    """Holds one call's device, base and banks of clips, which are made when first needed."""

    def __init__(self, scale: Scale, out: Path, seconds: float) -> None:
        self.scale, self.out, self.store = scale, out, Store(out)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.family = PixelWan.at(scale)
        self.workers, self.banks = Workers(), dict[int, Bank]()
        self.deadline = time.monotonic() + seconds if seconds else float("inf")
        self._check_scale()

    def run(self, cells: list[Cell]) -> bool:
        try:
            base = self._pretrained()
            left = cells
            while left := [cell for cell in left if not self._try(cell, base, cells)]:
                if time.monotonic() > self.deadline:
                    raise OutOfTime(f"other calls are working on {', '.join(c.name for c in left)}")
                time.sleep(WAIT)
        except OutOfTime as stopped:
            print(f"time is up: {stopped}; run the same command to resume.")
            return False
        return True

    def _pretrained(self) -> Path:
        """Return the base's folder; one call trains the base while others wait."""
        while True:
            try:
                with self._lock("base"):
                    return pretrain(
                        self.scale,
                        self.out,
                        self.device,
                        self.deadline,
                        lambda: Bank(self.scale, 1, PRETRAINED, self.device, self.workers),
                    )
            except Timeout:
                if time.monotonic() > self.deadline:
                    raise OutOfTime("another call is training the base") from None
                time.sleep(WAIT)

    def _try(self, cell: Cell, base: Path, cells: list[Cell]) -> bool:
        """Run the cell; return False if it has to wait for another call."""
        started = time.monotonic()
        try:
            with self._lock(cell.run):
                if self._cell(cell, base, cells):
                    taken = time.monotonic() - started
                    place = f"{cells.index(cell) + 1}/{len(cells)}"
                    print(f"{place} {cell.name}: {taken:.0f} s", flush=True)
        except (AtWork, Timeout):
            return False
        return True

    def _lock(self, name: str) -> FileLock:
        """Return a lock that ends with its process; taking it raises Timeout if another has it."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock", timeout=0)

    def _cell(self, cell: Cell, base: Path, cells: list[Cell]) -> bool:
        """Train, sample and measure; return whether anything was left to do. Raises AtWork."""
        result = self.store.load(cell.name)
        if result is not None and result.complete:
            return False
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"{cell.name} is not started")
        model, record = tuned(
            cell,
            self.family,
            base,
            self.out,
            self.device,
            self.deadline,
            lambda: self._bank(cell.factor),
            self._budget(cell, cells),
        )
        if cell.name in ANALYSED:
            path = self.out / "analysis" / f"{cell.name}.json"
            analyse(cell, model, self.family, path, self.device)
        if result is None:
            about = {"cell": cell.describe(), "measured_on": measured_on()}
            grid = self.scale.grid(cell.factor)
            result = Result(solved(cell, self.scale)[1], len(grid), about, vars(record))
        for name in SET_NAMES:
            if name in result.sets:
                continue
            if time.monotonic() > self.deadline:
                raise OutOfTime(f"{cell.name} is trained, but {name} is not sampled")
            self._measure(cell, model, name, result)
        return True

    def _measure(self, cell: Cell, model: torch.nn.Module, name: str, result: Result) -> None:
        clips = sample(
            model,
            self.family,
            cell.factor,
            name,
            seed=cell.seed,
            other_captions=cell.other_captions,
            device=self.device,
        )
        result.sets[name] = self.workers.measure(name, clips, self.scale.native)
        save_strip(self.out / "strips" / f"{cell.name}-{name}.png", clips)
        self.store.save(cell.name, result)

    def _budget(self, cell: Cell, cells: list[Cell]) -> float | None:
        """Return the GPU seconds of radial's steps at this length, by the first seed with results.

        Cells marked by steps get them too, as their run may pass both marks. None where no cell
        needs them. Raises AtWork while another call runs radial.
        """
        if cell.method == "none" or cell.row == "radial":
            return None
        radial = self.store.of_row("radial", cell.factor)
        if radial:
            timed_on = radial[0].about["measured_on"]
            if cell.mark == "seconds" and timed_on != measured_on():
                print(f"note: radial's seconds are of {timed_on}; this is {measured_on()}.")
            return radial[0].train["seconds"] if cell.row in ("dense", "spatial") else None
        if any((c.row, c.factor) == ("radial", cell.factor) for c in cells):
            raise AtWork  # they come first, so another call has taken them
        if cell.mark == "seconds":
            raise ConfigError(
                f"{cell.name} trains for as long as radial's steps took: run only=radial-"
                f"{cell.factor}x-seed0 first."
            )
        return None

    def _bank(self, factor: int) -> Bank:
        """Return a length's bank, drawn once per call and kept: some gigabytes of GPU memory."""
        if factor not in self.banks:
            self.banks[factor] = Bank(self.scale, factor, TRAINED, self.device, self.workers)
        return self.banks[factor]

    def _check_scale(self) -> None:
        """Raise ConfigError if the folder holds another scale's results, which would mix in."""
        path = self.out / "scale.json"
        now = json.dumps(vars(self.scale), indent=1)
        if path.is_file() and path.read_text() != now:
            raise ConfigError(
                f"out={self.out} holds an experiment of other sizes ({path}): choose another out, "
                "or delete it."
            )
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(now)
