"""Training of the base and of every cell, by the trainer's own parts: flow, LoRA, RoPE, attention,
optimizer, data order and checkpoints.

Everything random is a function of the seed and the step, and all cells use the same clips, so that
cells differ only in what their rows name.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longreel.data.files import replacing
from longreel.data.sampler import SeededBatches
from longreel.sparse.patterns import Dense, SparsePattern
from longreel.trainer import flow
from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Rope, RopeName, Sigma
from longreel.trainer.families.rope import RopePolicy
from longreel.trainer.optimizer import build_optimizer, lr_factor
from longreel.trainer.run import checkpoint

from .cells import Cell, solved
from .clips import Bank
from .pixels import Bf16Attention, PixelWan, to_latents
from .settings import Scale

LOGGED = 10  # steps between losses that results keep
EVERY = 60.0  # seconds between checkpoints
RECORD = "record.json"


class OutOfTime(Exception):
    """Raised when the call's time is up; the training so far is saved."""


@dataclass(frozen=True)
class Regime:
    """Says how a model is trained, without when to stop, which its marks decide."""

    method: Literal["lora", "full"]
    batch: int
    lr: float
    seed: int
    schedule: Literal["cosine", "constant"] = "constant"
    steps: int = 0  # length of a cosine schedule
    warmup: int = 0


@dataclass
class Record:
    """Holds the progress of a training.

    seconds: time of its steps alone, with the device synchronised. losses: pairs of a step and the
    mean loss since the previous pair.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)

    def write(self, folder: Path, tensors: object) -> None:
        """Write the record beside a checkpoint, as `checkpoint.ExtraFiles`."""
        (folder / RECORD).write_text(json.dumps(vars(self)))


def place(
    family: PixelWan,
    transformer: Any,
    *,
    pattern: SparsePattern,
    dense_layers: int = 0,
    rope: RopeName = "native",
    frames: int,
) -> Any:
    """Give a transformer its attention and positions."""
    lengths = {"native": family.scale.native, "target": frames}
    family.rope.apply(transformer, RopePolicy.resolve(Rope(rope), **lengths, axis=family.axis))
    attention = Bf16Attention(pattern, block=family.scale.block, dense_layers=dense_layers)
    family.install(transformer, attention)
    return transformer


def model_of(cell: Cell, family: PixelWan, base: Path, device: torch.device) -> Any:
    """Load the base on the device with a cell's attention and RoPE.

    On a GPU, frozen weights are bf16 and trained ones fp32.
    """
    half = device.type == "cuda" and cell.method != "full"
    transformer = family.load_base(base, torch.bfloat16 if half else torch.float32)
    return place(
        family,
        transformer.to(device),
        pattern=solved(cell, family.scale)[0],
        dense_layers=cell.dense_layers,
        rope=cell.rope,
        frames=family.scale.frames(cell.factor),
    )


def trainable(transformer: Any, family: PixelWan, regime: Regime) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, attaching the LoRA if that is the method."""
    if regime.method == "full":
        transformer.requires_grad_(True)
        return dict(transformer.named_parameters())
    products = "bfloat16" if transformer.dtype == torch.bfloat16 else "float32"
    rank = family.scale.rank
    return dict(
        lora.attach(transformer, family, rank=rank, compute_dtype=products, seed=regime.seed)
    )


class Training:
    """Runs one training, resumed from its folder if that holds a checkpoint."""

    def __init__(
        self,
        family: PixelWan,
        transformer: Any,
        regime: Regime,
        bank: Callable[[], Bank],
        folder: Path,
        device: torch.device,
    ) -> None:
        self.family, self.transformer, self.regime = family, transformer, regime
        self.folder, self.device = folder, device
        self.parameters = trainable(transformer, family, regime)
        transformer.train()
        self.optimizer = build_optimizer("adamw", self.parameters.values(), regime.lr, 0.0)
        self.record = Record()
        newest = checkpoint.latest(folder)
        if newest is not None:
            state = checkpoint.load(newest, self.parameters)
            checkpoint.scatter(state, self.parameters, self.optimizer)
            self.record = _read_record(newest)
        self._bank, self._saved, self._recent = bank, time.monotonic(), []

    def run(self, reached: Callable[[Record], bool], deadline: float) -> None:
        """Step until `reached`, saving a checkpoint every minute.

        Raises OutOfTime past the deadline, which is on the clock of `time.monotonic`.
        """
        if reached(self.record):
            return
        bank = self._bank()
        batches = SeededBatches(len(bank), self.regime.batch, self.regime.seed)
        self._rehearse(bank)
        while not reached(self.record):
            self._step(bank, batches.batch_at(self.record.step))
            late = time.monotonic() > deadline
            if late or time.monotonic() - self._saved > EVERY:
                self.save()
            if late and not reached(self.record):
                raise OutOfTime(f"{self.folder.name} stands at step {self.record.step}")

    def save(self) -> None:
        step = self.record.step
        progress = checkpoint.Progress(step, 1, "", [step * self.regime.batch])
        checkpoint.save(
            self.folder,
            checkpoint.gather(self.parameters, self.optimizer),
            progress,
            keep_last=1,
            extra=self.record,
        )
        self._saved = time.monotonic()

    def _rehearse(self, bank: Bank) -> None:
        """Run a step and discard it, so that kernels compile outside the timed steps."""
        self._loss(*bank.take([0] * self.regime.batch), seed=0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()

    def _step(self, bank: Bank, indices: list[int]) -> None:
        regime, record = self.regime, self.record
        started = time.perf_counter()
        step = record.step + 1
        lr = regime.lr * lr_factor(step, regime.warmup, regime.steps, regime.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        key = hashlib.sha256(f"{regime.seed}/{step}".encode()).digest()
        loss = self._loss(*bank.take(indices), seed=int.from_bytes(key[:6], "big"))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self._wait()
        if not math.isfinite(value):
            raise SystemExit(f"error: {self.folder.name}: loss {value} at step {step}.")
        record.step, record.seconds = step, record.seconds + time.perf_counter() - started
        self._recent.append(value)
        if step % LOGGED == 0:
            record.losses.append((step, sum(self._recent) / len(self._recent)))
            self._recent = []

    def _loss(self, pixels: Tensor, captions: list[str], seed: int) -> Tensor:
        scale = self.family.scale
        generator = torch.Generator().manual_seed(seed)
        on_device = torch.Generator(self.device).manual_seed(seed)
        clean = to_latents(pixels, scale.squeeze)
        sigma = flow.sample_sigmas(len(clean), Sigma(shift=scale.shift), generator)
        noise = torch.randn(clean.shape, generator=on_device, device=self.device)
        text = self.family.text.collate([self.family.encode_caption(c) for c in captions])
        text = {name: x.to(self.device) for name, x in text.items()}
        with half_products(self.device, self.regime.method == "full"):
            return flow.flow_matching_loss(
                self.family, self.transformer, clean, text, sigma.to(self.device), noise
            )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def half_products(device: torch.device, fp32_weights: bool) -> torch.autocast:
    """Return autocast to bf16 for fp32 weights on a GPU; it is disabled in all other cases."""
    enabled = device.type == "cuda" and fp32_weights
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def pretrain(
    scale: Scale, out: Path, device: torch.device, deadline: float, bank: Callable[[], Bank]
) -> Path:
    """Return the base model's folder; train it if missing, densely at the native length."""
    folder = out / "base"
    if (folder / RECORD).is_file():
        return folder
    family = PixelWan.at(scale)
    transformer = place(family, family.build(seed=0), pattern=Dense(), frames=scale.native)
    regime = Regime(
        "full",
        scale.pretrain_batch,
        scale.pretrain_lr,
        seed=0,
        schedule="cosine",
        steps=scale.pretrain_steps,
        warmup=scale.warmup,
    )
    training = Training(family, transformer.to(device), regime, bank, out / "runs/base", device)
    training.run(lambda record: record.step >= scale.pretrain_steps, deadline)
    training.save()
    family.save_base(transformer, folder)
    with replacing(folder / RECORD) as temporary:  # written last: marks the folder as complete
        temporary.write_text(json.dumps(vars(training.record)))
    return folder


def regime_of(cell: Cell, scale: Scale) -> Regime:
    assert cell.method != "none"
    lr = scale.lr if cell.method == "lora" else scale.full_lr
    return Regime(cell.method, scale.batch, lr, cell.seed, warmup=scale.warmup)


class Snapshots:
    """Stores the trained parameters and the record of a cell's run at its marks."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "adapters"

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.safetensors"

    def save(self, cell: Cell, training: Training) -> None:
        tensors = {k: p.detach().cpu().contiguous() for k, p in training.parameters.items()}
        with replacing(self.path(cell)) as temporary:
            save_file(tensors, temporary, metadata={"record": json.dumps(vars(training.record))})

    def load(self, cell: Cell, parameters: dict[str, nn.Parameter]) -> Record:
        from safetensors import safe_open

        with safe_open(self.path(cell), framework="pt") as file:
            record = Record(**json.loads((file.metadata() or {})["record"]))
        tensors = load_file(self.path(cell))
        assert tensors.keys() == parameters.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        return record


def tuned(
    cell: Cell,
    family: PixelWan,
    base: Path,
    out: Path,
    device: torch.device,
    deadline: float,
    bank: Callable[[], Bank],
    budget: float | None,
) -> tuple[Any, Record]:
    """Return a cell's model at its mark, trained if needed, and the record of its training.

    budget: GPU seconds of the mark `seconds`. A run that passes both marks saves a snapshot at
    each, so that neither is trained twice.
    """
    model = model_of(cell, family, base, device)
    if cell.method == "none":
        return model, Record()
    snapshots, steps = Snapshots(out), family.scale.steps
    regime = regime_of(cell, family.scale)
    if not snapshots.path(cell).is_file():
        folder = out / "runs" / cell.run
        if _is_past(cell, folder, steps, budget):
            shutil.rmtree(folder)
        training = Training(family, model, regime, bank, folder, device)
        marks: dict[str, Callable[[Record], bool]] = {"steps": lambda r: r.step >= steps}
        if budget is not None:
            marks["seconds"] = lambda r: r.seconds >= budget
        pending = {Cell(**{**vars(cell), "mark": mark}): reached for mark, reached in marks.items()}
        pending = {c: reached for c, reached in pending.items() if not snapshots.path(c).is_file()}
        while cell in pending:
            training.run(lambda r: any(f(r) for f in pending.values()), deadline)
            for passed in [c for c, reached in pending.items() if reached(training.record)]:
                snapshots.save(passed, training)
                del pending[passed]
        training.save()
        return model, training.record
    parameters = trainable(model, family, regime)
    return model, snapshots.load(cell, parameters)


def _is_past(cell: Cell, folder: Path, steps: int, budget: float | None) -> bool:
    """Return whether a run passed a cell's mark without a snapshot, so that it must restart."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return False
    record = _read_record(newest)
    if cell.mark == "steps":
        return record.step > steps
    assert budget is not None
    return record.seconds >= budget


def _read_record(checkpointed: Path) -> Record:
    return Record(**json.loads((checkpointed / RECORD).read_text(encoding="utf-8")))
