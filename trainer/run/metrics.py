"""Metrics of a run: metrics.csv always, and wandb if it works; wandb never fails the run."""

from __future__ import annotations

import csv
import logging
import netrc
import os
import resource
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...data.files import replacing
from ...sparse.attention import SparseAttention
from ...sparse.grid import TokenGrid

log = logging.getLogger(__name__)

Row = dict[str, Any]  # one line of metrics.csv by column, `step` among them

COLUMNS: tuple[str, ...] = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "seconds_per_step",
    "tokens_per_second",
    "peak_memory_gib",
    "attention_density",
    "attention_sparsity",
    "attention_pflop",
    "attention_dense_pflop",
    "attention_layer_speedup",
    "heldout_loss_target",
    "heldout_loss_native",
)
# Those of a clock and of the machine's memory, which differ between runs that learn the same.
MEASURED: frozenset[str] = frozenset(
    {"seconds_per_step", "tokens_per_second", "peak_memory_gib", "attention_layer_speedup"}
)


@dataclass(frozen=True)
class AttentionCost:
    """The cost of self-attention over all layers, with text and dense layers included.

    density: computed share of token pairs. layer_density: the same of one sparse layer. pflop:
        matrix products of one forward of one sample. dense_pflop: the same without sparsity
        (4 x tokens^2 x heads x head_dim per layer).
    """

    density: float
    layer_density: float
    pflop: float
    dense_pflop: float

    @classmethod
    def of(
        cls, attention: SparseAttention, grid: TokenGrid, layers: int, heads: int, head_dim: int
    ) -> AttentionCost:
        density = attention.token_density(grid, layers, heads)
        dense = 4 * len(grid) ** 2 * heads * head_dim * layers / 1e15
        return cls(density, attention.sparse_density(grid, heads), density * dense, dense)

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    @classmethod
    def sum(cls, costs: Sequence[AttentionCost]) -> AttentionCost:
        """Add up several forwards; densities are averaged, weighted by dense work."""
        pflop, dense = sum(cost.pflop for cost in costs), sum(cost.dense_pflop for cost in costs)
        layer = sum(cost.layer_density * cost.dense_pflop for cost in costs) / dense
        return cls(pflop / dense, layer, pflop, dense)

    def training(self, samples: int, *, recomputed: bool) -> AttentionCost:
        """Scale to an update over `samples`: backward costs 2.5 forwards, recomputation one."""
        passes = samples * (4.5 if recomputed else 3.5)
        return replace(self, pflop=passes * self.pflop, dense_pflop=passes * self.dense_pflop)


class Metrics:
    """The run's log: `metrics.csv` in its folder, and the same figures in wandb."""

    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        self.run_dir, self.path = run_dir, run_dir / "metrics.csv"
        self._resumed = resumed_step > 0
        kept = [row for row in self.rows() if int(row["step"]) <= resumed_step]
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept if resumed_step else [])
        self._wandb: Any = None
        self._unwritten: list[Row] = []

    def start_wandb(self, project: str, config: Mapping[str, Any]) -> None:
        """Log to wandb as well: offline without a key, so that nothing asks for one."""
        try:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
            self._wandb = wandb.init(
                project=project,
                name=self.run_dir.name,
                id=self._run_id(),
                resume="allow",
                dir=self.run_dir,
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, init_timeout=60, finish_timeout=120),
            )
            sync = f"; `wandb sync {self.run_dir}/wandb/offline-run-*` uploads it"
            log.info(f"wandb: {mode}{sync if mode == 'offline' else ''}.")
        except Exception as error:  # a run is worth more than its log
            self._give_up(error)

    def _run_id(self) -> str:
        """Return the run's id in wandb, kept in its folder: a resumed run continues there."""
        file = self.run_dir / "wandb_id"
        if not (self._resumed and file.is_file()):
            with replacing(file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12])
        return file.read_text()

    def write(self, row: Row) -> None:
        """Write a line of metrics.csv, and send its numbers to wandb.

        Lines that do not fit on a full disk are kept in memory and written later, in order.
        """
        first = not self._unwritten
        self._unwritten.append(row)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
                writer.writerows(self._unwritten)
            self._unwritten = []
        except OSError as error:
            os.truncate(self.path, size)  # removes lines that were written in part
            if first:
                log.error(f"Cannot write {self.path}; its new lines are kept in memory: {error}")
        figures = {k: v for k, v in row.items() if isinstance(v, float)}
        self._to_wandb(lambda wandb: figures, row["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        self._to_wandb(lambda wandb: {name: wandb.Image(str(path))}, step)

    def video(self, name: str, path: Path, step: int, caption: str) -> None:
        self._to_wandb(
            lambda wandb: {name: wandb.Video(str(path), caption=caption, format="mp4")}, step
        )

    def rows(self) -> list[dict[str, str]]:
        """Return the lines of metrics.csv by column, as text."""
        return read_rows(self.path)

    def column(self, name: str) -> dict[int, float]:
        """Return the numbers of one column by step."""
        return column(self.rows(), name)

    def close(self) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self._give_up(error)

    def _to_wandb(self, values: Callable[[Any], dict[str, Any]], step: int) -> None:
        """Log to wandb. values: makes them, given the wandb module; it may fail too."""
        if self._wandb is not None:
            try:
                import wandb

                self._wandb.log(values(wandb), step=step)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._wandb = None
        log.warning(f"wandb is off from here on, metrics.csv goes on: {error}")


def _has_key() -> bool:
    """Return whether wandb can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the lines of a metrics.csv by column, without a last line that was cut off."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def column(rows: Sequence[Mapping[str, str]], name: str) -> dict[int, float]:
    """Return the numbers of one column of metrics.csv by step."""
    return {int(row["step"]): float(row[name]) for row in rows if row[name]}


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
