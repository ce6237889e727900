"""Every kernel of the benchmark that a CPU can run gives what the oracle expects."""

from functools import partial

import pytest
import torch
from lib.problem import BLOCK, Kernel, Problem, dense
from torch.nn.attention import SDPBackend

from longreel.sparse.grid import TokenGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    return Problem(TokenGrid(6, 15, 17), heads=2, head_dim=16, device=DEVICE)


def test_the_grid_is_sparse_and_ragged(problem):
    """The tests below need both."""
    assert problem.layout.density < 1
    assert len(problem.grad[0]) % BLOCK


def test_flops(problem):
    assert problem.flops(dense=True) == 4 * 2 * 16 * 1530**2
    kept = int(problem.layout.to_dense().sum())
    assert problem.flops(dense=False) == 4 * 2 * 16 * 128 * 128 * kept


def test_launchers():
    """They run in fp16: Triton's interpreter gets products of bf16 wrong."""
    torch.manual_seed(0)
    problem = Problem(TokenGrid(4, 15, 17), heads=1, head_dim=16, device=DEVICE)
    problem.qkv = tuple(x.half() for x in problem.qkv)
    problem.grad = problem.grad.half()
    assert problem.launched("portable").check(problem.expected(dense=False))[0] == ""


@pytest.mark.parametrize("heads_first", [False, True])
def test_autograd(problem, heads_first):
    kernel = problem.differentiated(problem.listed("reference"), heads_first)
    assert kernel.check(problem.expected(dense=False))[0] == ""
    assert kernel.check(problem.expected(dense=True))[0].startswith("wrong: relative error")


def test_dense(problem):
    kernel = problem.differentiated(partial(dense, SDPBackend.MATH))
    assert kernel.check(problem.expected(dense=True))[0] == ""


def test_a_kernel_that_does_not_run(problem):
    def fails():
        raise RuntimeError("no such instruction\nand more")

    complaint = Kernel(fails, lambda saved: saved).check(problem.expected(dense=True))[0]
    assert complaint == "failed: RuntimeError: no such instruction"
