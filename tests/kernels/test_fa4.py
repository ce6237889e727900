"""The fa4 backend around a stand-in for flash-attn-4: its lists, checks and messages."""

import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
from testing import Case, check_attention, make_lists, random_lists, with_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longreel.kernels.block_sparse import (
    block_sparse_attention,
    fa4,
    op,
    reference,
    resolve_backend,
    selfcheck,
)
from longreel.kernels.block_sparse.lists import Lists

BF16 = torch.bfloat16
CASE = Case(BF16, tokens=300, head_dim=64, block=128)


class BlockLists(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]

    def keep(self) -> Tensor:
        """Return bool [1 or H, rows, columns], from the entries that the kernels read."""
        assert not self.mask_block_cnt.any()
        counts, indices = self.full_block_cnt[0], self.full_block_idx[0]
        assert counts.dtype == indices.dtype == torch.int32
        keep = torch.zeros(*counts.shape, counts.shape[-1], dtype=torch.bool)
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            listed = indices[*place, : counts[*place]].long()
            assert (listed.diff() > 0).all()
            keep[*place, listed] = True
        return keep


class StandIn:
    """Answers as `flash_attn.cute.interface` would, by way of the reference."""

    BlockSparseTensorsTorch = BlockLists

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.spoil = dict.fromkeys(selfcheck.QUANTITIES, lambda x: x)

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, block_sparse_tensors, return_lse):
        assert return_lse
        self.sizes.append(tuple(q.shape))
        lists = self._lists(block_sparse_tensors.keep(), q.shape[2])
        out, lse = reference.forward(q, k, v, lists, softmax_scale)
        return self.spoil["out"](out), self.spoil["lse"](lse), None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, *, softmax_scale, block_sparse_tensors, dlse, dq, dk, dv
    ):
        lists = self._lists(block_sparse_tensors.keep().mT, q.shape[2])
        grads = reference.backward(dout, dlse, q, k, v, out, lse, lists, softmax_scale)
        for name, to, grad in zip(("dq", "dk", "dv"), (dq, dk, dv), grads, strict=True):
            to.copy_(self.spoil[name](grad))

    @staticmethod
    def _lists(keep: Tensor, heads: int):
        made = make_lists(keep, 128, list(range(heads)) if len(keep) > 1 else [0] * heads)
        return Lists(*made.tensors, None, 128)


@pytest.fixture
def package(monkeypatch):
    """Replace flash-attn-4 by the stand-in, which runs on a CPU, and make its self-check small."""
    stand_in = StandIn()
    monkeypatch.setattr(fa4, "_package", lambda: stand_in)
    monkeypatch.setattr(fa4, "check_inputs", lambda *_: None)
    monkeypatch.setattr(fa4, "CHECKED_TOKENS", 256)
    fa4._failure.cache_clear()
    yield stand_in
    fa4._failure.cache_clear()


def attend(*args, **kw):
    return block_sparse_attention(*args, **kw, backend="fa4")


@pytest.mark.parametrize("layouts", [(0, 0), (0, 1, 0)])
def test_lists_equal_the_dense_layout(layouts, package):
    lists = random_lists(1100, 128, list(layouts))
    keep = lists.keep[list(layouts)] if max(layouts) else lists.keep
    rows = fa4._tensors(lists.row_indices, lists.row_indptr, lists.head_to_layout)
    columns = fa4._tensors(lists.col_indices, lists.col_indptr, lists.head_to_layout)
    assert torch.equal(rows.keep(), keep)
    assert torch.equal(columns.keep(), keep.mT)
    assert rows.full_block_idx.shape[-1] == lists.keep.sum(-1).max()


def test_lists_of_nothing(package):
    lists = make_lists(torch.zeros(1, 3, 3, dtype=torch.bool), 128, [0])
    assert not fa4._tensors(lists.row_indices, lists.row_indptr, lists.head_to_layout).keep().any()


@pytest.mark.parametrize("case", [CASE, Case(BF16, 256, 64, 128, layouts=(0,), scale=0.3)])
def test_attention(case, package):
    check_attention(attend, case)


def test_expanded_inputs_are_copied(package, monkeypatch):
    """Strides of 0 would make the package compile kernels that were not checked."""
    (q, k, v), _, lists, _ = CASE.make()
    seen = []
    backward = StandIn._flash_attn_bwd
    monkeypatch.setattr(
        StandIn,
        "_flash_attn_bwd",
        lambda self, q, k, v, out, dout, lse, **kw: (
            seen.extend([*k.stride(), *dout.stride()]),
            backward(self, q, k, v, out, dout, lse, **kw),
        ),
    )
    q.requires_grad_()
    attend(q, k[:, :, :1].expand(k.shape), v, *lists.tensors, block=128)[0].sum().backward()
    assert seen and 0 not in seen


def test_lists_are_converted_once(package, monkeypatch):
    """This also holds where activation checkpointing recomputes the forward."""
    qkv, grads, lists, _ = CASE.make()
    attend(*qkv, *lists.tensors, block=128)  # with the conversions of the check
    made = []
    make = fa4._tensors.make
    monkeypatch.setattr(fa4._tensors, "make", lambda *x: made.append(0) or make(*x))
    lists = random_lists(CASE.tokens, 128, list(CASE.layouts))

    def layer(q, k, v):
        return attend(q, k, v, *lists.tensors, block=128)

    for _ in range(2):
        with_gradients(layer, *qkv, *grads)
        with_gradients(lambda *x: checkpoint(layer, *x, use_reentrant=False), *qkv, *grads)
    assert len(made) == 2  # by rows and by columns


def test_a_check_for_each_kind_of_call(package):
    def call(batch, tokens, layouts):
        shape = batch, tokens, len(layouts), 64
        lists = random_lists(tokens, 128, list(layouts))
        package.sizes.clear()
        attend(*torch.randn(3, *shape).to(BF16), *lists.tensors, block=128)
        assert package.sizes.pop() == shape
        return package.sizes

    assert call(1, 1000, (0, 0, 0)) == [(1, 256 + 104, 2, 64)]
    assert call(1, 1000 + 128, (0, 0, 0, 0)) == []  # the same kernels, the same tail
    assert call(3, 1000, (0, 0)) == [(2, 256 + 104, 2, 64)]  # several samples
    assert call(1, 1000, (0, 1, 2)) == [(1, 256 + 104, 2, 64)]  # heads of different layouts
    assert call(1, 1001, (0,)) == [(1, 256 + 105, 1, 64)]  # another tail
    assert call(1, 90, (0,)) == [(1, 90, 1, 64)]  # short


WRONG = {
    "out": lambda x: x * 1.05,
    "lse": lambda x: x + 0.1,
    "dq": lambda x: x.masked_fill(torch.arange(x.shape[1])[:, None, None] == 20, 0),
    "dk": lambda x: x.roll(1, dims=2),
    "dv": lambda x: x.clone().index_fill_(1, torch.tensor(0), float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_refused(name, package):
    """Every call is refused, before anything is computed for the caller."""
    package.spoil[name] = WRONG[name]
    qkv, _, lists, _ = CASE.make()
    for _ in range(2):
        message = rf"fails its check .*: {name} is off by .*; use backend='triton'"
        with pytest.raises(RuntimeError, match=message):
            attend(*qkv, *lists.tensors, block=128)
    assert package.sizes == [(2, 300, 2, 64)]


def test_a_package_that_breaks_is_refused(package):
    def breaks(*_, **__):
        raise TypeError("unexpected argument 'dlse'")

    package._flash_attn_bwd = breaks
    qkv, _, lists, _ = CASE.make()
    with pytest.raises(RuntimeError, match="TypeError: unexpected argument 'dlse'"):
        attend(*qkv, *lists.tensors, block=128)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_auto_is_never_fa4(head_dim, installed, monkeypatch):
    """It is not even on the GPU and for the inputs that fa4 supports."""
    loaded = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fa4, "_package", lambda: loaded.append(0) or StandIn())
    if not installed:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert resolve_backend("auto", torch.device("cuda"), BF16, head_dim) == "triton"
    assert not loaded


def test_calls_with_auto_do_not_check_it(package):
    qkv, grads, lists, _ = CASE.make()
    attend = partial(block_sparse_attention, block=128, backend="auto")
    with_gradients(lambda *x: attend(*x, *lists.tensors), *qkv, *grads)
    assert package.sizes == []


@pytest.mark.parametrize("installed", [False, True])
def test_torch_compile_does_not_trace_whether_it_is_installed(installed, monkeypatch):
    cuda = torch.device("cuda")

    def chosen(x: torch.Tensor) -> torch.Tensor:
        try:
            return x + (resolve_backend("fa4", cuda, BF16, 128) == "fa4")
        except ValueError:
            return x

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    if installed:
        monkeypatch.setattr(fa4, "_package", StandIn)
    else:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    torch.compiler.reset()  # the answer is a constant of what was compiled
    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == installed


BAD = {  # device, compute capability, dtype, head_dim, block
    "float32": ("cuda", (9, 0), torch.float32, 128, 128),
    "not 32": ("cuda", (9, 0), BF16, 32, 128),
    "block=128, not 64": ("cuda", (9, 0), BF16, 128, 64),
    "NVIDIA GPU": ("cpu", None, BF16, 128, 128),
    "this GPU has 10.0": ("cuda", (10, 0), BF16, 128, 128),
    r"pip install 'longreel\[fa4\]'": ("cuda", (9, 0), BF16, 128, 128),
}


@pytest.mark.parametrize("message", BAD)
def test_messages(message, monkeypatch):
    device, capability, *inputs = BAD[message]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    with pytest.raises(ValueError, match=message):
        resolve_backend("fa4", torch.device(device), *inputs)


def test_calls_it_has_no_kernel_for(package):
    qkv, _, lists, _ = CASE.make()
    valid = torch.tensor([300, 200], dtype=torch.int32)
    with pytest.raises(ValueError, match="takes no valid"):
        attend(*qkv, *lists.tensors, block=128, valid=valid)
    torch.use_deterministic_algorithms(True)  # the fixture of all tests here takes it back
    attend(*qkv, *lists.tensors, block=128)
    with pytest.raises(ValueError, match="not deterministic"):
        attend(qkv[0].clone().requires_grad_(), *qkv[1:], *lists.tensors, block=128)
    torch.use_deterministic_algorithms(False)
    leaf = qkv[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="deterministic=True"):
        attend(leaf, *qkv[1:], *lists.tensors, block=128, deterministic=True)
    attend(leaf, *qkv[1:], *lists.tensors, block=128)
    assert len(package.sizes) == 3


def test_opcheck(package):
    (q, k, v), (grad_out, grad_lse), lists, _ = Case(BF16, 200, 64, 128, layouts=(0, 1)).make()
    settings = (None, 128, 0.25, "fa4", False)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.longreel.block_sparse_attention.default, (*leaves, *lists.tensors, *settings)
    )
    out, lse = op._attention(q, k, v, *lists.tensors, *settings)
    torch.library.opcheck(
        torch.ops.longreel.block_sparse_attention_backward.default,
        (grad_out.to(BF16), grad_lse, q, k, v, out, lse, *lists.tensors, *settings),
    )


def test_compile_fullgraph(package):
    qkv, grads, lists, _ = CASE.make()

    def scaled(q, k, v):
        out, lse = attend(q * 2, k, v, *lists.tensors, block=128)
        return out + 1, lse

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    eager = with_gradients(scaled, *qkv, *grads)
    for name, value in with_gradients(compiled, *qkv, *grads).items():
        torch.testing.assert_close(value, eager[name], msg=name)


def test_selfcheck_knows_right_from_wrong_and_leaves_the_random_state():
    state = torch.get_rng_state()
    size = (1, 70, 2, 16)

    def fault(backward):
        return selfcheck.find_fault(
            reference.forward, backward, size, 2, 16, torch.float32, torch.device("cpu")
        )

    assert fault(reference.backward) is None
    shifted = fault(lambda *x: [grad + 1e-3 for grad in reference.backward(*x)])
    assert shifted is not None and shifted.startswith("dq is off by 1.0e-03")
    assert torch.equal(torch.get_rng_state(), state)
