"""The compiled kernels on an NVIDIA GPU: every variant small, then real sizes."""

from functools import partial

import pytest
import torch
from testing import (
    Case,
    Lists,
    assert_within_budget,
    check_attention,
    make_lists,
    plain_attention,
    random_lists,
    token_mask,
    with_gradients,
)
from torch import Tensor

from longreel.kernels.block_sparse import block_sparse_attention, resolve_backend

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = {
    "product": Case(BF16, 1000, 128, 128, valid=(777, 1000), layouts=(0, 1, 0)),
    "no mask": Case(BF16, 1024, 128, 128),
    "some samples without keys": Case(BF16, 1000, 128, 128, valid=(0, 200), layouts=(0,)),
    "large logits": Case(BF16, 1000, 128, 128, valid=(777, 1000), std=10**0.5),
    "narrow heads, large logits": Case(BF16, 1000, 64, 128, valid=(777, 1000), std=10**0.5),
    "below zero": Case(BF16, 1000, 128, 128, valid=(777, 1000), shift=2.0),
    "half": Case(FP16, 1000, 128, 128, valid=(777, 900)),
    "narrow heads": Case(BF16, 1000, 64, 128, valid=(777, 1000), layouts=(0, 1, 0)),
    "narrow heads, half": Case(FP16, 1000, 64, 128, valid=(0, 900)),
    "narrow heads, no mask": Case(BF16, 1024, 64, 128),
    "narrower heads": Case(BF16, 500, 32, 128, valid=(377, 500)),
    "narrowest heads": Case(BF16, 500, 16, 128, valid=(377, 500)),
    "small blocks": Case(BF16, 500, 64, 64, valid=(377, 500)),
    "smallest blocks": Case(BF16, 200, 16, 16, valid=(77, 200)),
    "fp32": Case(FP32, 300, 64, 32, valid=(177, 300)),
    "wide fp32": Case(FP32, 300, 128, 128, valid=(177, 300)),
}


HOPPERS = [
    name for name, x in CASES.items() if x.block == 128 and x.head_dim >= 64 and x.dtype != FP32
]


def triton(*args, **kw):
    """Run the deterministic backward: two passes."""
    return block_sparse_attention(*args, **kw, backend="triton", deterministic=True)


def fused(*args, **kw):
    """Run the backward in one pass, on Hopper."""
    return block_sparse_attention(*args, **kw, backend="triton", deterministic=False)


def unaligned(x: Tensor) -> Tensor:
    """Return the same values one element past a 16-byte boundary, where no tensor map can start."""
    wide = x.new_empty(*x.shape[:3], x.shape[3] + 1)[..., 1:]
    return wide.copy_(x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_small(case):
    check_attention(triton, case, device="cuda")


@pytest.mark.parametrize("name", HOPPERS)
def test_small_fused(name):
    check_attention(fused, CASES[name], device="cuda")


@pytest.mark.parametrize("name", ["product", "narrow heads"])
def test_unaligned(name):
    check_attention(triton, CASES[name], device="cuda", move=unaligned)


@pytest.mark.parametrize("name", ["product", "narrow heads"])
@pytest.mark.parametrize(
    "attend, move",
    [(triton, None), (fused, None), (triton, unaligned)],
    ids=["hopper", "fused", "portable"],
)
def test_masked_keys_may_hold_anything(name, attend, move):
    (q, k, v), (grad_out, _), lists, valid = CASES[name].make("cuda")
    ends = valid.tolist()
    dirty_k, dirty_v = k.clone(), v.clone()
    for b, end in enumerate(ends):
        dirty_k[b, end:], dirty_v[b, end:] = float("nan"), float("inf")

    def run(q, k, v):
        leaves = [(move(x) if move else x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, *lists.tensors, block=128, valid=valid)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
        return out, lse, dk, dv, dq

    *equal, (got, expected) = zip(run(q, dirty_k, dirty_v), run(q, k, v), strict=True)
    assert all(torch.equal(*pair) for pair in equal)
    if attend is fused:  # added up in any order
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["product", "narrow heads"])
def test_flex(name):
    def flex(*args, **kw):
        return block_sparse_attention(*args, **kw, backend="flex")

    check_attention(flex, CASES[name], device="cuda")


FA4_CASES = {
    "per head": Case(BF16, 1000, 128, 128, layouts=(0, 1, 0)),
    "shared": Case(BF16, 1000, 128, 128, layouts=(0, 0)),
    "one head": Case(BF16, 1000, 128, 128, layouts=(0,)),
    "whole blocks": Case(BF16, 1024, 128, 128),
    "a few tokens over": Case(BF16, 900, 128, 128),
    "one short block": Case(BF16, 90, 128, 128),
    "large logits": Case(BF16, 1000, 128, 128, std=10**0.5),
    "narrow heads, large logits": Case(BF16, 1000, 64, 128, std=10**0.5),
    "below zero": Case(BF16, 1000, 128, 128, shift=2.0),
    "scale and large logits": Case(BF16, 1000, 128, 128, scale=0.2, std=2.0),
    "half": Case(FP16, 1000, 128, 128),
    "narrow heads": Case(BF16, 1000, 64, 128, layouts=(0, 1, 0)),
    "narrow heads, shared": Case(BF16, 900, 64, 128, layouts=(0, 0)),
    "narrow heads, whole blocks": Case(BF16, 1024, 64, 128),
    "narrow heads, half": Case(FP16, 1000, 64, 128),
}


@pytest.fixture
def fa4():
    try:
        resolve_backend("fa4", torch.device("cuda"), BF16, 128)
    except ValueError as error:
        pytest.skip(str(error))
    return partial(block_sparse_attention, backend="fa4")


@pytest.mark.parametrize("case", FA4_CASES.values(), ids=FA4_CASES)
def test_fa4(case, fa4):
    check_attention(fa4, case, device="cuda")


@pytest.mark.parametrize("name", ["per head", "narrow heads"])
def test_fa4_unaligned(name, fa4):
    check_attention(fa4, FA4_CASES[name], device="cuda", move=unaligned)


def test_fa4_rows_without_keys(fa4):
    """out 0, lse -inf and zero gradients, even where the loss turns lse into NaN."""
    lists = make_lists(torch.zeros(1, 3, 3, dtype=torch.bool, device="cuda"), 128, [0, 0])
    q, k, v = torch.randn(3, 1, 300, 2, 128, device="cuda", dtype=BF16).requires_grad_()
    out, lse = fa4(q, k, v, *lists.tensors, block=128)
    assert not out.any() and (lse == float("-inf")).all()
    for grad in torch.autograd.grad(out.float().sum() + (lse - lse).sum(), (q, k, v)):
        assert not grad.any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fa4_equals_triton_at_real_sizes(head_dim, fa4):
    lists = video_lists(30 * 3600 + 77, 3600, 77, 1)
    shape = 1, 30 * 3600 + 77, 2, head_dim
    qkv = torch.randn(3, *shape, device="cuda", dtype=BF16).unbind()
    grads = torch.randn(shape, device="cuda"), torch.randn(1, 2, shape[1], device="cuda")
    to_layout = torch.zeros(2, dtype=torch.int32, device="cuda")
    tensors = (*lists.tensors[:4], to_layout)
    ours, theirs = (
        with_gradients(lambda *x, attend=attend: attend(*x, *tensors, block=128), *qkv, *grads)
        for attend in (triton, fa4)
    )
    assert torch.equal(ours["lse"].isinf(), theirs["lse"].isinf())
    for name, expected in ours.items():
        a, b = (x.float().nan_to_num(neginf=0) for x in (theirs[name], expected))
        assert (a - b).norm() < 1e-2 * b.norm(), name


def test_auto_is_triton():
    """It is, no matter whether flash-attn-4 is installed."""
    device = torch.device("cuda")
    assert resolve_backend("auto", device, BF16, 128) == "triton"
    with pytest.raises(ValueError, match="backend='reference'"):
        resolve_backend("triton", device, torch.float64, 128)


def check_compiled(attend, case: Case):
    qkv, grads, lists, valid = case.make("cuda")

    def doubled(q, k, v):
        out, lse = attend(q, k, v, *lists.tensors, block=128, valid=valid)
        return out * 2, lse

    compiled = torch.compile(doubled, fullgraph=True)
    eager = with_gradients(doubled, *qkv, *grads)
    for name, value in with_gradients(compiled, *qkv, *grads).items():
        torch.testing.assert_close(value, eager[name], msg=name)


def test_compile_fullgraph():
    check_compiled(block_sparse_attention, CASES["product"])


def test_fa4_compile_fullgraph(fa4):
    check_compiled(fa4, FA4_CASES["per head"])


def check_synchronisation(attend, case: Case):
    qkv, grads, lists, valid = case.make("cuda")
    leaves = [x.requires_grad_() for x in (x.detach() for x in qkv)]

    def step():
        out, lse = attend(*leaves, *lists.tensors, block=128, valid=valid)
        torch.autograd.grad((out, lse), leaves, (grads[0].to(out.dtype), grads[1]))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attend", [triton, fused])
def test_no_host_synchronisation(attend):
    check_synchronisation(attend, CASES["product"])


def test_fa4_no_host_synchronisation(fa4):
    check_synchronisation(fa4, FA4_CASES["per head"])


def video_lists(tokens: int, per_frame: int, text: int, layouts: int) -> Lists:
    """Lists shaped like Radial Attention's: all of the near frames, thinning with distance, a first
    frame that all see, dense text. One block row in the middle is empty."""
    rows = -(-tokens // 128)
    place = torch.arange(rows, device="cuda")
    frames_apart = (place[:, None] - place).abs() * 128 / per_frame
    keep = torch.rand(layouts, rows, rows, device="cuda") < 1 / frames_apart.clamp(min=1)
    keep[:, :, : per_frame // 128] = True
    first_text = (tokens - text) // 128
    keep[:, first_text:] = True
    keep[:, :, first_text:] = True
    keep[:, rows // 2] = False
    return make_lists(keep, 128, list(range(layouts)))


def one_head_in_chunks(
    qkv: tuple[Tensor, ...], grads: tuple[Tensor, Tensor], lists: Lists, head: int, end: int
) -> dict[str, Tensor]:
    """`plain_attention` of one [1, S, 1, D] head and its gradients, some queries at a time."""
    q, k, v = qkv
    tokens = q.shape[1]
    key_block = torch.arange(tokens, device="cuda") // 128
    counts = torch.arange(tokens, device="cuda") < end
    parts, dk, dv = [], 0, 0
    for start in range(0, tokens, 512):
        rows = slice(start, start + 512)
        mask = lists.keep[head, key_block[rows, None], key_block] & counts

        def attend(q, k, v, mask=mask):
            return plain_attention(q, k, v, mask, q.shape[-1] ** -0.5)

        part = with_gradients(attend, q[:, rows], k, v, grads[0][:, rows], grads[1][..., rows])
        dk, dv = dk + part.pop("dk").double(), dv + part.pop("dv").double()
        parts.append(part)
    whole = {
        name: torch.cat([p[name] for p in parts], 2 if name == "lse" else 1) for name in parts[0]
    }
    return {**whole, "dk": dk.to(k.dtype), "dv": dv.to(k.dtype)}


REAL = {  # frames, tokens a frame, text, head_dim, valid text tokens per sample
    "hunyuan 30 x 3600 + 77": (30, 3600, 77, 128, None),
    "hunyuan 41 x 3840": (41, 3840, 0, 128, None),
    "mochi 56 x 1590 + 256, batch 2": (56, 1590, 256, 128, (40, 251)),
    "narrow heads, batch 2": (30, 3600, 300, 64, (7, 300)),
}


@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_real_sizes(shape):
    """One head equals fp64 throughout. All heads are bit-equal when repeated and free of NaN; in
    one pass too, except for dq."""
    frames, per_frame, text, head_dim, valid_text = shape
    tokens, heads, batch = frames * per_frame + text, 2, len(valid_text or [0])
    lists = video_lists(tokens, per_frame, text, heads)
    valid = None
    if valid_text:
        valid = torch.tensor(valid_text, dtype=torch.int32, device="cuda") + frames * per_frame
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=BF16).unbind(2)
    grad_out = torch.randn_like(qkv[0])
    grad_lse = torch.randn(batch, heads, tokens, device="cuda")

    def run(attend) -> dict[str, Tensor]:
        def ours(q, k, v):
            return attend(q, k, v, *lists.tensors, block=128, valid=valid)

        return with_gradients(ours, *qkv, grad_out, grad_lse)

    got, again, in_one_pass = (run(attend) for attend in (triton, triton, fused))
    for name, value in got.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, in_one_pass[name]) or name == "dq", name
        assert not value.isnan().any(), name
    got["fused dq"] = in_one_pass["dq"]
    assert not got["fused dq"].isnan().any()

    def only(x: Tensor, sample: int, head: int) -> Tensor:
        one = slice(sample, sample + 1), slice(head, head + 1)
        return x[one] if x.ndim == 3 else x[one[0], :, one[1]]

    sample, head = 0, heads - 1
    end = tokens if valid is None else int(valid[sample])
    qkv_one = tuple(only(x, sample, head).contiguous() for x in qkv)
    grads_one = only(grad_out, sample, head), only(grad_lse, sample, head)
    same = one_head_in_chunks(qkv_one, grads_one, lists, head, end)
    oracle = one_head_in_chunks(tuple(x.double() for x in qkv_one), grads_one, lists, head, end)
    same["fused dq"], oracle["fused dq"] = same["dq"], oracle["dq"]
    for name, expected in oracle.items():
        value = only(got[name], sample, head)
        assert_within_budget(name, value, same[name], expected)
        if name == "lse":  # a bf16 competitor is no measure of an fp32 output
            finite = expected.isfinite()
            assert (value - expected)[finite].abs().max() < 1e-4


@pytest.mark.large
@pytest.mark.parametrize("attend", [triton, fused])
def test_past_two_to_the_31(attend):
    """The last head of more than 2**31 elements equals the same head alone, bit for bit, but for a
    sum in no fixed order."""
    tokens, heads, head_dim = 130_000, 132, 128
    keep = torch.eye(-(-tokens // 128), dtype=torch.bool, device="cuda")
    keep |= keep.roll(1, 0) | keep.roll(-7, 1)
    lists = make_lists(keep[None], 128, [0] * heads)
    alone = make_lists(keep[None], 128, [0])
    qkv = tuple(
        torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=BF16) for _ in range(3)
    )
    assert qkv[0].numel() > 2**31
    grads = torch.randn_like(qkv[0]), torch.randn(1, heads, tokens, device="cuda")

    def run(lists, qkv, grads):
        return with_gradients(lambda *x: attend(*x, *lists.tensors, block=128), *qkv, *grads)

    whole = run(lists, qkv, grads)
    last = tuple(x[:, :, -1:].contiguous() for x in qkv)
    one = run(alone, last, (grads[0][:, :, -1:], grads[1][:, -1:]))
    for name, value in one.items():
        part = whole[name][:, -1:] if name == "lse" else whole[name][:, :, -1:]
        if attend is fused and name == "dq":
            torch.testing.assert_close(part, value)
        else:
            assert torch.equal(part, value), name


def test_random_layouts_are_as_near_as_flex():
    """They are as near to fp64, with layouts of each head: an independent compiled implementation
    is the measure."""
    lists = random_lists(5000, 128, [0, 1, 2], density=0.3, device="cuda")
    qkv = torch.randn(2, 5000, 3, 3, 128, device="cuda", dtype=BF16).unbind(2)
    valid = torch.tensor([4900, 3001], dtype=torch.int32, device="cuda")
    ours, flex = (
        block_sparse_attention(*qkv, *lists.tensors, block=128, valid=valid, backend=backend)
        for backend in ("triton", "flex")
    )
    mask = token_mask(lists, 5000, valid)
    oracle = plain_attention(*(x.double() for x in qkv), mask, qkv[0].shape[-1] ** -0.5)
    exponent = oracle[1].nan_to_num(neginf=0).abs().max().item()
    for name, got, same, expected in zip(("out", "lse"), ours, flex, oracle, strict=True):
        assert_within_budget(name, got, same, expected, exponent=exponent)
