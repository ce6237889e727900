"""Every fused operator under `torch.compile`: one graph, of static and of dynamic shapes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from norms import NORM_CASES
from testing import make_lists
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longreel.kernels.block_sparse import block_sparse_attention
from longreel.kernels.modulated_norm import gated_add, modulated_norm
from longreel.kernels.norm_rope import norm_rope

TOKENS = (40, 56, 72)
Inputs = tuple[list[Tensor], dict[str, Tensor | None]]  # those with gradients, and the others
# Scale, shift and gate in all forms that they may have; 2 is the batch.
MODULATIONS = {
    "of each sample": {"scale": (2, 48), "shift": (2, 1, 48), "gate": (48,)},
    "for all samples": {"scale": (1, 48), "shift": (1, 1, 48), "gate": (2, 48)},
}


def of_modulation(shapes: dict[str, tuple[int, ...]], tokens: int, device: str) -> Inputs:
    leaves = [torch.randn(2, tokens, 48, device=device) for _ in range(2)]
    return leaves, {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def modulated(x: Tensor, y: Tensor, *, scale, shift, gate, backend: str) -> Tensor:
    normed = modulated_norm(y, scale, shift, norm="layer", eps=1e-6, backend=backend)
    return gated_add(x, normed, gate, backend=backend)


def of_norm_rope(name: str, tokens: int, device: str) -> Inputs:
    case = NORM_CASES[name]
    made = type(case)(**vars(case) | {"tokens": tokens, "video": tokens - 3}).make(device)
    leaves = [made.pop("x")] + ([made.pop("text")] if case.text else [])
    return [x.contiguous() for x in leaves], made


def normed(name: str, x: Tensor, text: Tensor | None = None, **own) -> Tensor:
    return norm_rope(x, **{"text": text} | own, **NORM_CASES[name].options)


def of_attention(tokens: int, device: str) -> Inputs:
    rows = -(-tokens // 16)
    keep = torch.ones(1, rows, rows, dtype=torch.bool, device=device).tril()
    lists = make_lists(keep, 16, [0, 0, 0])
    names = ("row_indptr", "row_indices", "col_indptr", "col_indices", "head_to_layout")
    own = dict(zip(names, lists.tensors, strict=True))
    valid = torch.tensor([tokens, tokens - 9], dtype=torch.int32, device=device)
    leaves = [torch.randn(2, tokens, 3, 16, device=device) for _ in range(3)]
    return leaves, own | {"valid": valid}


def attended(q: Tensor, k: Tensor, v: Tensor, **own) -> Tensor:
    return block_sparse_attention(q, k, v, **own, block=16)[0]


OPERATORS: dict[str, tuple[Callable[[int, str], Inputs], Callable[..., Tensor]]] = {
    **{
        f"modulated_norm and gated_add, {name}": (partial(of_modulation, shapes), modulated)
        for name, shapes in MODULATIONS.items()
    },
    **{
        f"norm_rope, {name}": (partial(of_norm_rope, name), partial(normed, name))
        for name in ("mochi", "wan")  # with text and tables of each head; with neither
    },
    "block_sparse_attention": (of_attention, attended),
}


@pytest.mark.parametrize(
    ("device", "dynamic"),
    [
        ("cpu", None),  # static and dynamic shapes in one
        *(pytest.param("cpu", dynamic, marks=pytest.mark.slow) for dynamic in (False, True)),
        *(pytest.param("cuda", d, marks=pytest.mark.gpu) for d in (False, True, None)),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_into_one_graph(name: str, dynamic: bool | None, device: str):
    """Output and gradients are bit-equal to eager ones, and a dynamic graph takes all lengths.

    None is torch's default: static at first, then dynamic where a size has changed.
    """
    make, compute = OPERATORS[name]
    backend = "reference" if device == "cpu" else "triton"
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        partial(compute, backend=backend), fullgraph=True, dynamic=dynamic, backend=graphs
    )
    new_graphs = []
    for tokens in TOKENS:
        before = graphs.frame_count
        leaves, own = make(tokens, device)
        results = []
        for function in (partial(compute, backend=backend), compiled):
            inputs = [x.detach().clone().requires_grad_() for x in leaves]
            out = function(*inputs, **own)
            grads = torch.autograd.grad(out.float().square().sum(), inputs)
            results.append((out.detach(), *grads))
        for eager, got in zip(*results, strict=True):
            assert torch.equal(eager, got)
        new_graphs.append(graphs.frame_count > before)
    assert (
        new_graphs
        == {
            False: [True, True, True],
            True: [True, False, False],
            None: [True, True, False],
        }[dynamic]
    )
