"""Updates of an adapter by processes that share clips, and by one process alone.

`torchrun parallel_cases.py FILE CASES` (JSON) runs cases on all processes, each under its engine,
and saves what they learn.
"""

import copy
import json
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense, Radial, SlidingTile, SpatialTemporal
from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Config, Memory, Parallel, Train
from longreel.trainer.families import FAMILIES, RopePolicy
from longreel.trainer.families.names import diffusers_class
from longreel.trainer.flow import flow_matching_loss
from longreel.trainer.memory.checkpointing import block_checkpoint
from longreel.trainer.memory.offload import Offload
from longreel.trainer.parallel.engine import trainable
from longreel.trainer.parallel.open import open_engine
from longreel.trainer.parallel.sequence import SequenceGroup
from longreel.trainer.run import checkpoint
from longreel.trainer.run.checkpoint import State

PATTERNS = {
    "dense": Dense(),
    "radial": Radial(),
    # Heads 0 and 1, and 2 and 3, by layouts and orders of tokens of their own.
    "spatial_temporal": SpatialTemporal(half_width=1),
    # Each head in a layout of its own, all in one order of tokens.
    "sliding_tile": SlidingTile(tile="4x2x2", windows="1x1x3,3x1x1,1x3x1,3x3x3"),
}
HEADS, CPU = 4, torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """frames: of 3 x 5 tokens, so that neither 2 nor 4 processes share them evenly. texts: lengths
    of the captions in a batch; the next data-parallel process and batch have longer ones."""

    family: str
    pattern: str = "radial"
    frames: int = 9
    texts: tuple[int, ...] = (3, 7)
    recompute: str = "none"
    offload: bool = False
    mlp_chunk: int = 0
    fused: bool = False
    targets: str = "attention"
    rope: str = "native"
    accumulate: int = 1
    sequence: int = 2
    engine: str = "ddp"

    @property
    def name(self) -> str:
        return json.dumps(asdict(self))


def build(case: Case, group: SequenceGroup):
    """Transformer in training as the loop sets it up, with four heads and its first layer dense."""
    family = FAMILIES[case.family]
    torch.manual_seed(0)
    config = tiny.load_config(family) | {"num_attention_heads": HEADS}
    transformer = diffusers_class(family.names.transformer).from_config(config)
    with torch.no_grad():
        for parameter in transformer.parameters():  # learned frequencies and gates, 0 at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    tiny.randomise(lora.attach(transformer, family, rank=4, targets=case.targets))
    family.rope.apply(transformer, RopePolicy(case.rope, native=5, target=9))
    attention = SparseAttention(PATTERNS[case.pattern], block=16, dense_layers=1)
    family.install(transformer, attention, **(tiny.fusions(family) if case.fused else {}))
    if case.mlp_chunk:
        family.blocks.chunk_mlp(transformer, case.mlp_chunk)
    blocks = block_checkpoint(Memory(recompute=case.recompute), attention, CPU)
    if blocks is not None:
        blocks.offload = Offload(CPU, page=512) if case.offload else None
        transformer.enable_gradient_checkpointing(blocks)
    group.attach(family, transformer, attention)
    return family, transformer.train()


def loss_of(case: Case, family, model, data_rank: int, micro: int) -> Tensor:
    """Return the loss of the clips that a data-parallel process takes in one batch of an update."""
    seed = 10 * data_rank + micro
    texts = [tiny.make_text(family, n + seed % 7, seed=seed + i) for i, n in enumerate(case.texts)]
    clean = tiny.make_inputs(family, frames=case.frames, texts=case.texts, seed=seed)
    clean, generator = clean["hidden_states"], torch.Generator().manual_seed(seed)
    noise, sigma = (torch.randn(s, generator=generator) for s in (clean.shape, len(clean)))
    guidance = 1.0 if family.name == "hunyuan" else None
    text = family.text.collate(texts)
    return flow_matching_loss(family, model, clean, text, sigma.sigmoid(), noise, guidance)


STEPS, LIMIT = 2, 0.5  # updates of a case, and the gradient norm that they are clipped to


def make_optimizer(parameters) -> torch.optim.Optimizer:
    """AdamW whose updates do not blow up what is noise in a gradient near 0."""
    return torch.optim.AdamW(parameters, lr=0.05, eps=1e-3, weight_decay=0.01)


def result(before: State, after: State, losses: list[Tensor], norms: list[Tensor]) -> dict:
    """Losses, gradient norms, what was learnt and the moments: what a case is compared by."""
    learnt = {f"learnt.{name}": x - before.adapter[name] for name, x in after.adapter.items()}
    moments = {
        f"{moment}.{name}": x
        for name, tensors in after.moments.items()
        for moment, x in tensors.items()
    }
    return {"loss": torch.stack(losses), "norm": torch.stack(norms)} | learnt | moments


def update_alone(case: Case, data_size: int) -> dict[str, Tensor]:
    """Return what one process learns from the clips of all, in plain PyTorch."""
    family, transformer = build(case, SequenceGroup())
    named = trainable(transformer)
    optimizer = make_optimizer(named.values())
    before, losses, norms = copied(checkpoint.gather(named, optimizer)), [], []
    for step in range(STEPS):
        batches = [
            (rank, step * case.accumulate + micro)
            for rank in range(data_size)
            for micro in range(case.accumulate)
        ]
        parts = [loss_of(case, family, transformer, *batch) / len(batches) for batch in batches]
        loss = torch.stack(parts).sum()
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), LIMIT))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return result(before, checkpoint.gather(named, optimizer), losses, norms)


def copied(state: State) -> State:
    return copy.deepcopy(state)


def update_together(case: Case) -> dict[str, Tensor]:
    """The same by all processes under an engine; empty in all but the first.

    A step is skipped before the first, which must leave nothing behind, and the state that is left
    after the first is restored over what a further step made of it.
    """
    AcceleratorState._reset_state()  # of the case before
    train = Train(gradient_accumulation=case.accumulate, max_grad_norm=LIMIT)
    engine_class, accelerator = open_engine(
        Config(train=train, parallel=Parallel(engine=case.engine)), timedelta(minutes=9)
    )
    group = SequenceGroup.create(case.sequence, HEADS)
    family, transformer = build(case, group)
    engine = engine_class(accelerator, transformer, make_optimizer)

    def backward(step: int) -> Tensor:
        total = torch.zeros(())
        for micro in range(case.accumulate):
            batch = step * case.accumulate + micro
            with engine.batch(last=micro == case.accumulate - 1):
                loss = loss_of(case, family, engine.model, group.data_rank, batch)
                engine.backward(loss / case.accumulate)
            total += loss.detach() / case.accumulate
        dist.all_reduce(total)
        return total / dist.get_world_size()

    before, losses, norms = copied(engine.gather()), [], []
    assert not before.adam_steps
    backward(7)
    engine.clip(LIMIT)
    engine.skip()
    for step in range(STEPS):
        losses.append(backward(step))
        norms.append(engine.clip(LIMIT))
        engine.step()
        if step == 0:
            state = [copied(engine.gather())]
            backward(8)
            engine.clip(LIMIT)
            engine.step()
            dist.broadcast_object_list(state)  # as each process reads it from a checkpoint
            engine.restore(state[0])
    after = engine.gather()
    return result(before, after, losses, norms) if dist.get_rank() == 0 else {}


def main(file: str, cases: str) -> None:
    torch.manual_seed(0)
    updates = {}
    for plain in json.loads(cases):
        case = Case(**plain | {"texts": tuple(plain["texts"])})
        together = update_together(case)
        updates |= {f"{case.name}/{key}": x.contiguous() for key, x in together.items()}
    if dist.get_rank() == 0:
        save_file(updates, Path(file))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
