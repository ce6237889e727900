"""`longreel draw`: what a recipe's attention computes, as a picture and in numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..trainer.config.fields import setting
from ..trainer.config.values import ConfigError

USAGE = "longreel draw recipe=NAME [key=value ...]"
TAKES_RECIPE = True


@dataclass(frozen=True)
class DrawOptions:
    """The options of `longreel draw` beside a recipe's settings."""

    out: str = setting("mask.png", "The picture to write, a .png in a folder that exists.")


OPTIONS = DrawOptions


def draw(argv: list[str]) -> None:
    """Write the figure, and print density, blocks, reach and the seconds that the lists took."""
    from ..trainer.config.recipe import load, split_options

    options, rest = split_options(DrawOptions, argv)
    out = options.out
    if not out.endswith(".png"):
        raise ConfigError(f"out={out} must end in .png.")
    if not Path(out).parent.is_dir():
        raise ConfigError(f"out={out}: {Path(out).parent} is not a folder.")
    config = load(rest)

    from ..sparse.draw import draw_pattern
    from ..sparse.reach import layers_to_full_reach
    from ..trainer.job import Job
    from ..trainer.run.progress import quiet_libraries
    from ..trainer.summary import density_by_layer, save_figure, solved_density

    quiet_libraries()
    job = Job.from_config(config, published=True)

    attention, grid, geometry = job.attention(), job.grid(job.frames), job.geometry
    pattern, block, heads = attention.pattern, attention.block, geometry.heads
    start = time.perf_counter()
    layout = attention.layout(grid)
    seconds = time.perf_counter() - start
    layers = attention.layer_densities(grid, geometry.layers, heads)
    sparse = attention.sparse_density(grid, heads)
    reach = layers_to_full_reach(pattern, grid, block, heads)
    size = f"{grid.frames} x {grid.height} x {grid.width} video and {grid.text} text tokens"
    title = f"{pattern}\n{size}, {sparse:.2%} of all pairs computed in a sparse layer"
    save_figure(draw_pattern(pattern, grid, block, title, heads), Path(out))
    used = sorted(set(pattern.head_layouts(heads)))
    kept = [int(layout.row_indptr[i, -1] - layout.row_indptr[i, 0]) for i in used]
    rows = {
        "pattern": str(pattern),
        "tokens": f"{len(grid):,}: {size}",
        "blocks": f"{layout.rows:,} a side of {block} tokens, {_layouts(len(used))}; "
        f"{sum(kept):,} kept, {sum(kept) / (len(used) * layout.rows**2):.3%}",
        "density": f"{sparse:.3%} of all token pairs in a sparse layer",
        "width": None if config.sparse.density is None else solved_density(job, sparse),
        "all layers": density_by_layer(layers),
        "reach": "never: some video tokens stay apart however many layers"
        if reach is None
        else f"{reach} sparse layers until every video token has reached every other",
        "time": f"{seconds:.2f} s for the lists",
        "note": pattern.note(grid.without_text(), block),
        "figure": out,
    }
    for name, text in rows.items():
        if text is not None:
            print(f"{name + ':':12}{text}")


def _layouts(count: int) -> str:
    return "one layout" if count == 1 else f"{count} layouts"
