"""One update of an adapter by processes that share clips, and by one process alone.

`torchrun parallel_cases.py FILE CASES` (JSON) runs cases on all processes and saves their updates.
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense, Radial, SlidingTile, SpatialTemporal
from longreel.trainer import lora
from longreel.trainer.config import Memory
from longreel.trainer.families import FAMILIES, RopePolicy
from longreel.trainer.families.base import diffusers_class
from longreel.trainer.flow import flow_matching_loss
from longreel.trainer.memory import block_checkpoint
from longreel.trainer.offload import Offload
from longreel.trainer.parallel import SequenceGroup

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
    checkpoint: str = "none"
    offload: bool = False
    mlp_chunk: int = 0
    fused_norms: bool = False
    targets: str = "attention"
    rope: str = "native"
    accumulate: int = 1
    sequence: int = 2

    @property
    def name(self) -> str:
        return json.dumps(asdict(self))


def build(case: Case, group: SequenceGroup):
    """Transformer in training as the loop sets it up, with four heads and its first layer dense."""
    family = FAMILIES[case.family]
    torch.manual_seed(0)
    config = tiny.load_config(family) | {"num_attention_heads": HEADS}
    transformer = diffusers_class(family.transformer_name).from_config(config)
    with torch.no_grad():
        for parameter in transformer.parameters():  # learned frequencies and gates, 0 at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    tiny.randomise(lora.attach(transformer, family, rank=4, targets=case.targets))
    family.set_rope(transformer, RopePolicy(case.rope, native=5, target=9))
    attention = SparseAttention(PATTERNS[case.pattern], block=16, dense_layers=1)
    family.install(transformer, attention, fused_norms=case.fused_norms)
    if case.mlp_chunk:
        family.chunk_mlp(transformer, case.mlp_chunk)
    blocks = block_checkpoint(Memory(checkpoint=case.checkpoint), attention, CPU)
    if blocks is not None:
        blocks.offload = Offload(CPU, page=512) if case.offload else None
        transformer.enable_gradient_checkpointing(blocks)
    group.attach(family, transformer, attention)
    return family, transformer.train()


def loss_of(case: Case, family, model, data_rank: int, micro: int) -> Tensor:
    """Of the clips that a data-parallel process takes in one batch of an update."""
    seed = 10 * data_rank + micro
    texts = [tiny.make_text(family, n + seed % 7, seed=seed + i) for i, n in enumerate(case.texts)]
    clean = tiny.make_inputs(family, frames=case.frames, texts=case.texts, seed=seed)
    clean, generator = clean["hidden_states"], torch.Generator().manual_seed(seed)
    noise, sigma = (torch.randn(s, generator=generator) for s in (clean.shape, len(clean)))
    guidance = 1.0 if family.name == "hunyuan" else None
    text = family.collate_text(texts)
    return flow_matching_loss(family, model, clean, text, sigma.sigmoid(), noise, guidance)


def parameters(transformer):
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def update_alone(case: Case, data_size: int) -> dict[str, Tensor]:
    """Gradients, which is what gradient descent subtracts, and the loss, of one process that takes
    every clip."""
    family, transformer = build(case, SequenceGroup())
    batches = [(rank, micro) for rank in range(data_size) for micro in range(case.accumulate)]
    losses = [loss_of(case, family, transformer, *batch) / len(batches) for batch in batches]
    loss = torch.stack(losses).sum()
    loss.backward()
    return {"loss": loss.detach()} | {k: p.grad for k, p in parameters(transformer).items()}


def update_together(case: Case) -> dict[str, Tensor]:
    """The same by all processes under DistributedDataParallel."""
    group = SequenceGroup.create(case.sequence, HEADS)
    family, transformer = build(case, group)
    model = DistributedDataParallel(transformer)
    total = torch.zeros(())
    for micro in range(case.accumulate):
        last = micro == case.accumulate - 1
        with contextlib.nullcontext() if last else model.no_sync():
            loss = loss_of(case, family, model, group.data_rank, micro) / case.accumulate
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    grads = {name: p.grad for name, p in parameters(transformer).items()}
    return {"loss": total / dist.get_world_size()} | grads


def main(file: str, cases: str) -> None:
    dist.init_process_group("gloo")
    updates = {}
    for plain in json.loads(cases):
        case = Case(**plain | {"texts": tuple(plain["texts"])})
        updates |= {f"{case.name}/{key}": x for key, x in update_together(case).items()}
    if dist.get_rank() == 0:
        save_file({key: x.contiguous() for key, x in updates.items()}, Path(file))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
