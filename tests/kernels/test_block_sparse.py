"""Every backend against a dense fp64 oracle, and the op against PyTorch's own checks."""

import subprocess
import sys

import pytest
import torch
from testing import Case, check_attention, make_lists, random_lists, with_gradients
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from longreel.kernels.block_sparse import block_sparse_attention, resolve_backend
from longreel.kernels.block_sparse import reference as reference_module
from longreel.kernels.block_sparse.tuning import Tile, Tiles

OP = torch.ops.longreel.block_sparse_attention.default


CASES = {
    "plain": Case(tokens=64, layouts=(0,)),
    "ragged": Case(),
    "valid": Case(valid=(50, 72)),
    "valid cuts whole blocks": Case(valid=(19, 32)),
    "nothing valid": Case(valid=(0, 72), layouts=(0,)),
    "bf16": Case(torch.bfloat16, head_dim=32, block=32, valid=(90, 40), tokens=100),
    "fp16": Case(torch.float16, head_dim=32, block=32, valid=(33, 100), tokens=100),
    "one short block": Case(tokens=5, valid=(3, 5)),
    "scale and large logits": Case(scale=0.7, std=2.0),
    "logits far below zero": Case(shift=5.0, valid=(50, 72)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case):
    check_attention(
        lambda *args, **kw: block_sparse_attention(*args, **kw, backend="reference"), case
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flex(case):
    """Eager FlexAttention on a CPU (its mask function, not the block lists) has no backward."""
    qkv, _, lists, valid = case.make()
    attend = {"block": case.block, "valid": valid, "scale": case.scale}
    got, expected = (
        block_sparse_attention(*qkv, *lists.tensors, **attend, backend=backend)
        for backend in ("flex", "reference")
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        block_sparse_attention(
            qkv[0].requires_grad_(), *qkv[1:], *lists.tensors, **attend, backend="flex"
        )


def triton(*args, **kw):
    return block_sparse_attention(*args, **kw, backend="triton")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton(case, interpreted):
    check_attention(triton, case)


def use_tile(monkeypatch, tile: Tile) -> None:
    from longreel.kernels.block_sparse import backward, forward

    for module in (forward, backward):
        monkeypatch.setattr(module, "choose", lambda *_: Tiles(tile, tile, tile))


@pytest.mark.parametrize("q, kv", [(16, 32), (32, 16), (16, 16)])
@pytest.mark.parametrize("valid", [None, (41, 72), (16, 32)], ids=str)
def test_tiles_smaller_than_a_block(q, kv, valid, interpreted, monkeypatch):
    use_tile(monkeypatch, Tile(q, kv, 4, 2))
    check_attention(triton, Case(block=32, valid=valid, layouts=(0,)))


def test_long_lists_are_searched(interpreted):
    """Twenty blocks a row, most of them past `valid`."""
    check_attention(triton, Case(tokens=312, valid=(30, 300), layouts=(0,)))


def test_64_bit_offsets(interpreted, tmp_path):
    """Tokens 2**27 elements apart, on a sparse file, so that offsets pass 2**32."""
    tokens, stride, head_dim = 40, 2**27, 16
    size = tokens * stride
    wide = torch.from_file(str(tmp_path / "sparse"), True, size, dtype=torch.bfloat16)
    wide = wide.as_strided((1, tokens, 1, head_dim), (size, stride, head_dim, 1))
    wide.copy_(torch.randn(wide.shape))
    lists = random_lists(tokens, 16, [0])
    close = wide.contiguous()

    def attend(x):
        leaf = x.detach().requires_grad_()
        out, lse = triton(leaf, leaf, leaf, *lists.tensors, block=16)
        return out, lse, *torch.autograd.grad(out.float().square().sum(), leaf)

    for got, expected in zip(attend(wide), attend(close), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masked_keys_may_hold_anything(backend, interpreted):
    (q, k, v), (grad_out, _), lists, valid = CASES["valid"].make()
    attend = {"block": 16, "valid": valid, "backend": backend}
    clean = block_sparse_attention(q, k, v, *lists.tensors, **attend)[0]
    k, v = k.clone(), v.clone()
    k[0, 50:], v[0, 50:] = float("nan"), float("inf")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, *lists.tensors, **attend)[0]
    assert torch.equal(out, clean)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
    assert dq.isfinite().all()
    assert not dk[0, 50:].any() and not dv[0, 50:].any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_without_keys(backend, interpreted):
    """out 0, lse -inf and zero gradients, even where the loss turns lse into NaN or infinity."""
    lists = make_lists(torch.zeros(1, 3, 3, dtype=torch.bool), 16, [0, 0])
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    out, lse = block_sparse_attention(q, k, v, *lists.tensors, block=16, backend=backend)
    assert not out.any() and (lse == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum() + (lse - lse).sum(), (q, k, v)):
        assert not grad.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_repeats_are_bit_equal(backend, interpreted):
    qkv, grads, lists, valid = CASES["bf16"].make()

    def run():
        return with_gradients(
            lambda *x: block_sparse_attention(
                *x, *lists.tensors, block=lists.block, valid=valid, backend=backend
            ),
            *qkv,
            *grads,
        )

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reference_gradcheck():
    _, _, lists, valid = CASES["valid"].make()
    q, k, v = (torch.randn(2, 72, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    # Gradients of an infinite lse are undefined: only finite ones are checked.

    def attend(q, k, v):
        out, lse = block_sparse_attention(q, k, v, *lists.tensors, block=16, valid=valid)
        return out, lse.masked_fill(lse == float("-inf"), 0)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


def test_reference_in_many_groups(monkeypatch):
    """Groups of one row each give what one group gives."""
    qkv, grads, lists, valid = CASES["valid"].make()

    def run():
        return with_gradients(
            lambda *x: block_sparse_attention(*x, *lists.tensors, block=16, valid=valid),
            *qkv,
            *grads,
        )

    whole = run()
    monkeypatch.setattr(reference_module, "SCORE_BUDGET", 1)
    for name, value in run().items():
        torch.testing.assert_close(value, whole[name], msg=name)


@pytest.mark.parametrize("with_lse", [False, True])
def test_lse_alone_and_out_alone(with_lse, interpreted):
    """A loss that uses one output only: the other's gradient never exists."""
    (q, k, v), _, lists, _ = CASES["ragged"].make()
    keep = torch.ones_like(lists.keep)
    lists = make_lists(keep, 16, [0, 1, 0])
    grads = []
    for backend in ("reference", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outputs = block_sparse_attention(*leaves, *lists.tensors, block=16, backend=backend)
        grads.append(torch.autograd.grad(outputs[with_lse].sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend, interpreted):
    (q, k, v), (grad_out, grad_lse), lists, valid = Case(tokens=40, valid=(20, 40)).make()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    settings = (valid, 16, 0.25, backend, True)
    torch.library.opcheck(OP, (*leaves, *lists.tensors, *settings))
    out, lse = OP(q, k, v, *lists.tensors, *settings)
    torch.library.opcheck(
        torch.ops.longreel.block_sparse_attention_backward.default,
        (grad_out, grad_lse, q, k, v, out, lse, *lists.tensors, *settings),
    )


def test_compile_fullgraph():
    qkv, grads, lists, valid = CASES["valid"].make()

    def attend(q, k, v):
        out, lse = block_sparse_attention(
            q * 2, k, v, *lists.tensors, block=16, valid=valid, backend="auto"
        )
        return out + 1, lse

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    eager = with_gradients(attend, *qkv, *grads)
    for name, value in with_gradients(compiled, *qkv, *grads).items():
        torch.testing.assert_close(value, eager[name], msg=name)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_activation_checkpointing(keep_attention, monkeypatch):
    """Plain checkpointing recomputes the op; a selective policy on it keeps its outputs instead."""
    qkv, grads, lists, _ = CASES["ragged"].make()
    calls = []
    forward = reference_module.forward
    monkeypatch.setattr(reference_module, "forward", lambda *x: calls.append(0) or forward(*x))

    def attend(q, k, v):
        return block_sparse_attention(q.sin(), k, v, *lists.tensors, block=16)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is OP else CheckpointPolicy.PREFER_RECOMPUTE

    context = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}

    def checkpointed(q, k, v):
        return checkpoint(
            attend, q, k, v, use_reentrant=False, **(context if keep_attention else {})
        )

    expected = with_gradients(attend, *qkv, *grads)
    calls.clear()
    got = with_gradients(checkpointed, *qkv, *grads)
    assert len(calls) == (1 if keep_attention else 2)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_flex_masks_follow_their_tensors():
    """The cache of block masks never serves tensors that changed in place, nor keeps dead ones."""
    from longreel.kernels.block_sparse import flex

    (q, k, v), _, lists, _ = CASES["ragged"].make()
    valid = torch.tensor([30, 72], dtype=torch.int32)

    def mask_after_checking(lists):
        got, expected = (
            block_sparse_attention(q, k, v, *lists.tensors, block=16, valid=valid, backend=backend)[
                0
            ]
            for backend in ("flex", "reference")
        )
        torch.testing.assert_close(got, expected)
        return flex._block_mask.entries[lists.row_indices].result

    before = mask_after_checking(lists)
    assert mask_after_checking(lists) is before
    valid[0] = 60
    assert mask_after_checking(lists) is not before
    held = len(flex._block_mask.entries)
    del lists
    assert len(flex._block_mask.entries) == held - 1


BAD = {
    "head_dim": ({"q": (1, 32, 2, 24)}, "head_dim is 24"),
    "shapes": ({"k": (1, 16, 2, 16)}, "must all be"),
    "rows": ({"tokens": 80}, "build the layout for this sequence"),
    "valid shape": ({"valid": torch.zeros(3, dtype=torch.int32)}, "the batch is 1"),
    "valid dtype": ({"valid": torch.zeros(1, dtype=torch.int64)}, "int32"),
    "block": ({"block": 48}, "block is 48"),
    "backend": ({"backend": "fast"}, "'fast' is unknown"),
    "scale": ({"scale": -1.0}, "must be positive"),
    "dtype": ({"dtype": torch.float64, "backend": "flex"}, "backend='reference'"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_messages(change, message):
    change = dict(change)
    dtype = change.pop("dtype", torch.float32)
    shape = change.pop("q", (1, change.pop("tokens", 32), 2, 16))
    other = change.pop("k", shape)
    q, k, v = torch.zeros(shape, dtype=dtype), *torch.zeros(2, *other, dtype=dtype)
    lists = random_lists(32, 16, [0, 0])
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, *lists.tensors, **{"block": 16, **change})


def test_strided_last_dimension_is_refused():
    q = torch.zeros(1, 32, 16, 2).transpose(2, 3)
    with pytest.raises(ValueError, match=r"pass q.contiguous\(\)"):
        block_sparse_attention(q, q, q, *random_lists(32, 16, [0, 0]).tensors, block=16)


def test_resolve_backend():
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, torch.bfloat16, 128) == "reference"
    assert resolve_backend("flex", cpu, torch.bfloat16, 128) == "flex"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        resolve_backend("triton", torch.device("cpu"), torch.bfloat16, 128)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from testing import random_lists
from longreel.kernels.block_sparse import block_sparse_attention
q = torch.randn(1, 40, 2, 16, requires_grad=True)
tensors = random_lists(40, 16, [0, 0]).tensors
block_sparse_attention(q, q, q, *tensors, block=16)[0].sum().backward()
assert q.grad.isfinite().all()
try:
    block_sparse_attention(q, q, q, *tensors, block=16, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton():
    script = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "pip install" in script.stdout, script.stderr
