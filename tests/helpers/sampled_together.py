"""`sampled_together.py FILE` on several processes: the videos that the tiny models sample together,
which the first saves."""

import sys
from dataclasses import asdict

import numpy as np
import tiny
from runs import SHORT

from longreel.sparse.patterns import Radial
from longreel.trainer.adapter import lora
from longreel.trainer.families import FAMILIES
from longreel.trainer.parallel.sequence import SequenceGroup, join_all
from longreel.trainer.sampling.pipeline import apply_sparse_attention, generate, share_tokens

HEADS = 2  # of the tiny models
SIZE = {"height": 48, "width": 48, "steps": 3, "guidance": 4.0, "seed": 3}


def videos(group: SequenceGroup) -> dict[str, np.ndarray]:
    """Return videos of each family, sparse and dense, with guidance; empty in all but the group's
    first."""
    found = {}
    for family in FAMILIES.values():
        for attention in ("sparse", "dense"):
            transformer = tiny.load_transformer(family)
            tiny.randomise(lora.attach(transformer, family, rank=4))
            pipe = tiny.load_pipeline(family, transformer, text=False)
            entry = {"family": family.name, "pattern": {"name": "radial", **asdict(Radial())}}
            entry |= {"block": 16, "dense_layers": 1, "dense_steps": 1}
            if attention == "sparse":
                apply_sparse_attention(pipe, entry)
            if group.size > 1:
                share_tokens(pipe, group)
            texts = {"prompt": tiny.make_text(family), "negative": tiny.make_text(family, seed=1)}
            frames = generate(pipe, **texts, frames=8 * SHORT[family.name] - 7, **SIZE)
            if group.rank == 0:
                found[f"{family.name}, {attention}"] = np.stack(list(frames))
    return found


if __name__ == "__main__":
    group, _ = join_all(HEADS, "cpu")
    assert group.size > 1
    sampled = videos(group)
    if group.rank == 0:
        np.savez(sys.argv[1], **sampled)
