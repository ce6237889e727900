"""Brute force over token pairs, for the patterns' tests."""

import math

import torch


def in_order(pattern, grid, block, layout=0):
    """bool [video, video]: what a pattern keeps, token by token, as they stand in its order."""
    order = pattern.order(grid, block)
    if order is None:
        order = torch.arange(grid.video)
    elif order.dim() == 2:
        order = order[layout]
    return pattern.keep(grid, order[:, None], order[None], block, layout)


def layouts(pattern, grid, block):
    """The block matrices of a pattern, one for each layout, as a list."""
    blocks = pattern.blocks(grid, block)
    return list(blocks) if blocks.dim() == 3 else [blocks]


def any_pair(tokens, block):
    """bool [blocks, blocks]: blocks with a token pair that is kept."""
    n = math.ceil(len(tokens) / block)
    padded = torch.zeros(n * block, n * block, dtype=torch.bool)
    padded[: len(tokens), : len(tokens)] = tokens
    return padded.view(n, block, n, block).any(3).any(1)


def reduce_pairs(tokens, grid, block):
    """bool [blocks, blocks]: the density rule of Radial Attention's released code.

    Every frame pair alone, in a canvas at its offset to the block grid. The canvas is cut to whole
    blocks and the pairs are joined by OR; the sequence's partial last block is dense.
    """
    s, n = grid.per_frame, math.ceil(grid.video / block)
    kept = torch.zeros(n + 1, n + 1, dtype=torch.bool)  # a canvas may reach one block too far
    for i in range(grid.frames):
        for j in range(grid.frames):
            pair = tokens[i * s : (i + 1) * s, j * s : (j + 1) * s]
            down, right = i * s % block, j * s % block
            canvas = torch.zeros([o + math.ceil(s / block) * block for o in (down, right)]).bool()
            canvas[down : down + s, right : right + s] = pair
            rows, cols = (side // block for side in canvas.shape)
            for row in range(rows):
                for col in range(cols):
                    tile = canvas[row * block :, col * block :][:block, :block]
                    column_density = tile.sum(0) / block
                    touched = (column_density > 0).sum()
                    if touched and (column_density > 1 / 3).sum() / touched > 0.6:
                        kept[i * s // block + row, j * s // block + col] = True
    kept = kept[:n, :n]
    if grid.video % block:
        kept[-1] = kept[:, -1] = True
    return kept
