"""SparseAttention against SDPA over the same token pairs, and its plan across recomputation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as plain_checkpoint
from toys import Scattered, Slashes

from longreel.kernels.block_sparse import block_sparse_attention
from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer.memory.keep_attention import keeping_attention

SMALL = TokenGrid(12, 3, 5)  # 180 tokens: frames straddle blocks of 16 and the end is ragged
WITH_TEXT = TokenGrid(12, 3, 5, text=21)
LAYER = 3
RADIAL = Radial()


def inputs(tokens, batch=2, heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, batch, tokens, heads, dim)
    q, k, v, out_grad = torch.randn(shape, generator=generator, dtype=dtype)
    return *(x.clone().requires_grad_() for x in (q, k, v)), out_grad


def sdpa(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def masked_sdpa(pattern, grid, block, q, k, v, valid=None):
    """SDPA over the token pairs that the layout of each head keeps."""
    dense, token = build_layout(pattern, grid, block).to_dense(), torch.arange(len(grid))
    order = pattern.order(grid, block)
    masks = []
    for layout in pattern.head_layouts(q.shape[2]):
        block_of = token // block
        if order is not None:
            place = torch.empty(grid.video, dtype=torch.int64)
            place[order.expand(len(dense), -1)[layout]] = token[: grid.video]
            block_of[: grid.video] = place // block
        masks.append(dense[layout, block_of[:, None], block_of[None]])
    mask = torch.stack(masks)[None]
    if valid is not None:
        mask = mask & (token < torch.tensor(valid)[:, None, None, None])
    return sdpa(q, k, v, mask)


def gradients(function, q, k, v, out_grad):
    out = function(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), out_grad))


@pytest.mark.parametrize("valid", [None, [201, 185]], ids=["all valid", "padded text"])
@pytest.mark.parametrize("grid", [SMALL, WITH_TEXT], ids=["video", "video and text"])
def test_sparse_layers_equal_sdpa_over_the_kept_pairs(grid, valid):
    if valid is not None:
        valid = [min(length, len(grid)) for length in valid]
    tensors = inputs(len(grid), dtype=torch.float64)
    out = check_against_sdpa(Radial(), grid, valid, tensors)
    assert not torch.allclose(out, sdpa(*tensors[:3])), "the pattern must leave something out"


def check_against_sdpa(pattern, grid, valid, tensors):
    attention = SparseAttention(pattern, block=16, backend="reference")
    attention.plan(grid, valid=valid)
    got = gradients(lambda q, k, v: attention.attention(LAYER, q, k, v), *tensors)
    want = gradients(lambda *qkv: masked_sdpa(pattern, grid, 16, *qkv, valid=valid), *tensors)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)
    return got[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, *[st.integers(1, 5)] * 3, text=st.integers(0, 40)),
    st.lists(st.sampled_from(["raster", "shared", "own"]), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
    st.integers(0, 20),
    st.integers(0, 10**6),
)
def test_heads_with_orders_equal_sdpa_over_their_pairs(grid, orders, heads, padding, seed):
    """One order, several, or none, among any number of heads; forward and gradients."""
    heads = tuple(head % len(orders) for head in heads)
    pattern = Scattered(orders, heads, seed=seed)
    valid = [len(grid), len(grid) - min(padding, grid.text)]
    tensors = inputs(len(grid), heads=len(heads), dtype=torch.float64, seed=seed)
    check_against_sdpa(pattern, grid, valid, tensors)


def test_orders_take_views_of_a_fused_projection():
    attention = SparseAttention(Slashes(), block=16, backend="reference")
    attention.plan(SMALL)
    fused = torch.randn(2, len(SMALL), 3, 4, 16, dtype=torch.float64, requires_grad=True)
    out = attention.attention(LAYER, *fused.unbind(2))
    want = masked_sdpa(Slashes(), SMALL, 16, *fused.unbind(2))
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    grads = [torch.autograd.grad(x.square().sum(), fused)[0] for x in (out, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads", [(0, 1), (1,), (2, 0, 1)], ids=["two orders", "one", "three"])
def test_each_head_is_computed_in_its_own_order(heads, device):
    """Bit for bit the op on tokens that were put in order by hand, a head at a time."""
    pattern = Scattered(("raster", "own", "own"), heads)
    attention = SparseAttention(pattern, block=16)
    attention.plan(WITH_TEXT)
    made = inputs(len(WITH_TEXT), heads=5, dtype=torch.bfloat16)
    tensors = [x.detach().to(device).requires_grad_() for x in made]
    got = gradients(lambda q, k, v: attention.attention(LAYER, q, k, v), *tensors)
    layout = build_layout(pattern, WITH_TEXT, 16).to(device)
    lists = (layout.row_indptr, layout.row_indices, layout.col_indptr, layout.col_indices)
    text = torch.arange(WITH_TEXT.video, len(WITH_TEXT))
    for head, index in enumerate(pattern.head_layouts(5)):
        order = torch.cat([pattern.order(WITH_TEXT, 16)[index], text]).to(device)
        alone = [x.detach()[:, order, head : head + 1].requires_grad_() for x in tensors]
        follow = torch.tensor([index], dtype=torch.int32, device=device)
        want = gradients(
            lambda q, k, v, f=follow: block_sparse_attention(q, k, v, *lists, f, block=16)[0],
            *alone,
        )
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one[:, order, head : head + 1], other)


def test_bf16_with_orders_repeats_bit_for_bit():
    attention = SparseAttention(Slashes(), block=16, backend="reference")
    attention.plan(WITH_TEXT, valid=[201, 190])
    tensors = inputs(len(WITH_TEXT), heads=5, dtype=torch.bfloat16)
    run = [
        gradients(lambda q, k, v: attention.attention(LAYER, q, k, v), *tensors) for _ in range(2)
    ]
    assert all(map(torch.equal, *run))


def test_raster_orders_copy_nothing():
    """The very q, k and v are saved for the backward, not copies in another order."""
    grid = TokenGrid(5, 4, 4)
    q, k, v, _ = inputs(len(grid), heads=2)
    for heads, same in (((0, 0), True), ((0, 1), False), ((1, 1), False)):
        attention = SparseAttention(Scattered(("raster", "own"), heads), 16, "reference")
        attention.plan(grid)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            attention.attention(LAYER, q, k, v)
        places = {x.data_ptr() for x in saved if x is not None}
        assert [x.data_ptr() in places for x in (q, k, v)] == [same] * 3


def test_orders_compile():
    """The permutation is part of the graph of `torch.compile`, and its gradients are right."""
    attention = SparseAttention(Slashes(), block=16, backend="reference")
    attention.plan(SMALL)
    *tensors, out_grad = inputs(len(SMALL), heads=4, dtype=torch.float64)
    compiled = torch.compile(
        lambda q, k, v: attention.attention(LAYER, q, k, v), backend="aot_eager"
    )
    eager = gradients(lambda q, k, v: attention.attention(LAYER, q, k, v), *tensors, out_grad)
    for one, other in zip(gradients(compiled, *tensors, out_grad), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_padded_keys_have_no_influence():
    attention = SparseAttention(Radial(), block=16, backend="reference")
    attention.plan(WITH_TEXT, valid=[185, 201])
    q, k, v, _ = inputs(len(WITH_TEXT))
    before = attention.attention(LAYER, q, k, v)
    k, v = k.detach().clone(), v.detach().clone()
    k[0, 185:], v[0, 185:] = 100.0, -100.0
    assert torch.equal(attention.attention(LAYER, q, k, v), before)


class Slice:
    """An exchange without other processes: it takes some heads of tokens that are all present."""

    def __init__(self, heads):
        self.heads = heads

    def own_heads(self, heads):
        return self.heads

    def to_heads(self, x, grid):
        return x[:, :, self.heads]

    def to_tokens(self, x, grid):
        return x


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("heads", [(0, 0, 1, 1), (2, 0, 1, 0), (1, 0)])
def test_each_process_computes_its_heads_by_their_layouts(heads, layer):
    """Bit for bit those of the whole, dense or sparse, whatever the others' layouts and orders."""
    attention = SparseAttention(Scattered(("raster", "own", "own"), heads), block=16)
    attention.dense_layers = 1
    attention.plan(WITH_TEXT, valid=[len(WITH_TEXT), len(WITH_TEXT) - 3])
    q, k, v, _ = inputs(len(WITH_TEXT), heads=4)
    whole = attention.attention(layer, q, k, v)
    for part in (slice(0, 2), slice(2, 4)):
        attention.exchange = Slice(part)
        assert torch.equal(attention.attention(layer, q, k, v), whole[:, :, part])


@pytest.mark.parametrize("heads", [1, 3])
def test_every_head_follows_the_layout(heads):
    attention = SparseAttention(Radial(), block=16, backend="reference")
    attention.plan(SMALL)
    q, k, v, _ = inputs(len(SMALL), heads=heads)
    want = masked_sdpa(Radial(), SMALL, 16, q, k, v)
    torch.testing.assert_close(attention.attention(LAYER, q, k, v), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("valid", [None, [185, 201]], ids=["all valid", "padded text"])
@pytest.mark.parametrize(
    "options, layer, step",
    [
        ({"dense_layers": 2}, 1, None),
        ({"dense_layers": [0, 5]}, 5, None),
        ({"dense_steps": 2}, LAYER, 1),
        ({"dense_steps": [0, -1]}, LAYER, (9, 10)),
    ],
    ids=["first layers", "named layers", "first steps", "last step"],
)
def test_dense_layers_and_steps_are_sdpa_exactly(options, layer, step, valid):
    attention = SparseAttention(Radial(), block=16, **options)
    q, k, v, out_grad = inputs(len(WITH_TEXT))
    attention.plan(WITH_TEXT, valid=valid, step=step)
    got = gradients(lambda q, k, v: attention.attention(layer, q, k, v), q, k, v, out_grad)
    if valid is None:
        want = gradients(sdpa, q, k, v, out_grad)
        assert all(map(torch.equal, got, want))
        return
    for row, length in enumerate(valid):
        alone = [x[row : row + 1, :length].detach().requires_grad_() for x in (q, k, v)]
        want = gradients(sdpa, *alone, out_grad[row : row + 1, :length])
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one[row : row + 1, :length], other)
            assert not one[row, length:].any()


def test_the_dense_pattern_is_sdpa_in_every_layer():
    attention = SparseAttention(Dense(), block=16)
    attention.plan(SMALL)
    q, k, v, _ = inputs(len(SMALL))
    assert torch.equal(attention.attention(LAYER, q, k, v), sdpa(q, k, v))


def test_which_layers_and_steps_are_dense():
    attention = SparseAttention(Radial(), dense_layers=2, dense_steps=2)
    assert [attention.is_dense(layer) for layer in range(4)] == [True, True, False, False]
    for step, dense in ((None, False), (0, True), (1, True), (2, False)):
        assert attention.is_dense(LAYER, attention.planned(SMALL, step=step)) is dense
    named = SparseAttention(Radial(), dense_layers=(1, 3))
    assert [named.is_dense(layer) for layer in range(4)] == [False, True, False, True]
    assert SparseAttention(Dense()).is_dense(LAYER)


def test_dense_steps_may_count_from_the_last():
    ends = SparseAttention(Radial(), dense_steps=(0, 1, -1))
    dense = [ends.planned(SMALL, step=(step, 6)).dense for step in range(6)]
    assert dense == [True, True, False, False, False, True]
    assert not ends.planned(SMALL).dense
    with pytest.raises(ValueError, match=r"dense_steps=\[-1, 0, 1\] counts from the last step"):
        ends.planned(SMALL, step=3)
    first = SparseAttention(Radial(), dense_steps=2)
    assert [first.planned(SMALL, step=(step, 6)).dense for step in (1, 2)] == [True, False]


def test_density_counts_heads():
    """Three of four heads follow the second layout."""
    pattern = Scattered(("raster", "raster"), (0, 1, 1, 1), share=0.3)
    attention = SparseAttention(pattern, block=16, dense_layers=[1])
    plain, other = build_layout(pattern, WITH_TEXT, 16).token_densities(len(WITH_TEXT))
    assert plain != other
    sparse = (plain + 3 * other) / 4
    assert attention.sparse_density(WITH_TEXT, heads=4) == pytest.approx(sparse)
    assert attention.sparse_density(WITH_TEXT) == pytest.approx((plain + other) / 2)
    assert attention.layer_densities(WITH_TEXT, 3, 4) == pytest.approx([sparse, 1, sparse])
    assert attention.token_density(WITH_TEXT, 3, 4) == pytest.approx((1 + 2 * sparse) / 3)


def test_token_density_counts_dense_layers():
    attention = SparseAttention(Radial(), block=16, dense_layers=1)
    sparse = build_layout(Radial(), WITH_TEXT, 16).token_density(len(WITH_TEXT))
    assert 0 < sparse < 1
    assert attention.token_density(WITH_TEXT, layers=4) == pytest.approx((1 + 3 * sparse) / 4)


def test_a_forward_without_a_plan_fails():
    q, k, v, _ = inputs(8)
    with pytest.raises(RuntimeError, match="plan must be called before the model's forward"):
        SparseAttention(Radial()).attention(0, q, k, v)


def test_a_plan_for_another_length_fails():
    attention = SparseAttention(Radial(), block=16)
    attention.plan(SMALL)
    q, k, v, _ = inputs(len(SMALL) + 1)
    with pytest.raises(ValueError, match=r"181 tokens .* plan is for TokenGrid\(frames=12"):
        attention.attention(LAYER, q, k, v)


def test_a_later_plan_leaves_an_earlier_result_alone():
    """Two plans for one length: the second must not change what the first one's backward does."""
    wide, tall = TokenGrid(16, 4, 9), TokenGrid(9, 8, 8)
    tensors = inputs(576)

    def run(between):
        attention = SparseAttention(Radial(), block=16, backend="reference")
        attention.plan(wide)
        out = attention.attention(LAYER, *tensors[:3])
        if between:
            attention.plan(tall)
        return torch.autograd.grad(out, tensors[:3], tensors[3])

    assert all(map(torch.equal, run(False), run(True)))


class Block(torch.nn.Module):
    """A layer that calls the attention as a model's processor does."""

    def __init__(self, attention, layer_index):
        super().__init__()
        self.attention, self.layer_index = attention, layer_index
        self.qkv = torch.nn.Linear(16, 48, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (1, 48)).chunk(3, -1)
        return x + self.attention.attention(self.layer_index, q, k, v).flatten(2)


def two_forwards_one_backward(plans, checkpoint, pattern=RADIAL):
    """Gradients of both forwards' sum; `checkpoint(attention)` runs a block."""
    torch.manual_seed(0)
    attention = SparseAttention(pattern, block=16, backend="reference")
    blocks = torch.nn.ModuleList(Block(attention, index) for index in range(2))
    run, losses = checkpoint(attention), []
    for seed, (grid, valid) in enumerate(plans):
        attention.plan(grid, valid=valid)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, len(grid), 16, dtype=torch.float64, generator=generator)
        for block in blocks:
            x = run(block, x)
        losses.append(x.square().sum())
    return torch.autograd.grad(sum(losses), list(blocks.parameters())), attention


def directly(attention):
    return lambda block, x: block(x)


def without_the_plan(attention):
    return lambda block, x: plain_checkpoint(block, x, use_reentrant=False)


def with_the_plan(attention):
    return attention.recomputing


def keeping_what_attention_returned(attention):
    return partial(attention.recomputing, context_fn=keeping_attention)


PLANS = {
    "other length": [(SMALL, None), (WITH_TEXT, None)],
    "same length": [(TokenGrid(16, 4, 9), None), (TokenGrid(9, 8, 8), None)],
    "same grid": [(WITH_TEXT, [181]), (WITH_TEXT, [195])],
}


@pytest.mark.parametrize("checkpoint", [with_the_plan, keeping_what_attention_returned])
@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS.keys())
def test_recomputation_sees_the_plan_of_its_forward(plans, checkpoint):
    want, _ = two_forwards_one_backward(plans, directly)
    got, attention = two_forwards_one_backward(plans, checkpoint)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    grid, valid = plans[1]  # the latest plan is the current one again
    q, k, v, _ = inputs(len(grid), batch=1)
    after = attention.attention(LAYER, q, k, v)
    want_after = masked_sdpa(Radial(), grid, 16, q, k, v, valid)
    torch.testing.assert_close(after, want_after, rtol=1e-4, atol=1e-5)


def test_recomputation_without_it_would_be_wrong():
    """This is the fault that the test above protects from; it shows that the test can fail."""
    with pytest.raises(ValueError, match="180 tokens were given, but the plan is for"):
        two_forwards_one_backward(PLANS["other length"], without_the_plan)
    with pytest.raises(CheckpointError, match="different metadata"):  # lists of another length
        two_forwards_one_backward(PLANS["same length"], without_the_plan)
    want, _ = two_forwards_one_backward(PLANS["same grid"], directly)
    silent, _ = two_forwards_one_backward(PLANS["same grid"], without_the_plan)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(silent, want, strict=True))


@pytest.mark.parametrize("checkpoint", [with_the_plan, keeping_what_attention_returned])
def test_a_checkpointed_block_can_run_backward_twice(checkpoint):
    attention = SparseAttention(Radial(), block=16, backend="reference")
    block = Block(attention, LAYER)
    attention.plan(SMALL)
    x = torch.randn(1, len(SMALL), 16, dtype=torch.float64)
    loss = checkpoint(attention)(block, x).square().sum()
    attention.plan(WITH_TEXT)
    once = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(block.parameters()))
    assert all(map(torch.equal, once, twice))


def test_using_restores_the_plan_after_an_error():
    attention = SparseAttention(Dense())
    q, k, v, _ = inputs(len(SMALL))
    attention.plan(SMALL)
    with pytest.raises(KeyError), attention.using(attention.planned(WITH_TEXT)):
        with pytest.raises(ValueError, match="180 tokens were given"):
            attention.attention(LAYER, q, k, v)
        raise KeyError
    assert torch.equal(attention.attention(LAYER, q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize("pattern", [Radial(decay=0.7), Slashes(2)], ids=["raster", "orders"])
def test_lists_made_in_inference_mode_serve_a_backward(pattern):
    """A pipeline may run first, in inference mode, on the grid that is then trained on."""
    grid = TokenGrid(5, 4, 3)
    q, k, v = (torch.randn(1, len(grid), 2, 16, requires_grad=True) for _ in range(3))
    attention = SparseAttention(pattern, block=16)
    with torch.inference_mode():
        attention.plan(grid)
        attention.attention(0, q, k, v)
    attention.plan(grid)
    attention.attention(0, q, k, v).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS.keys())
def test_recomputation_with_orders(plans):
    pattern = Scattered(("raster", "own"), (1,))
    want, _ = two_forwards_one_backward(plans, directly, pattern)
    got, _ = two_forwards_one_backward(plans, with_the_plan, pattern)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_dense_layers_may_be_set_again():
    attention = SparseAttention(Radial(), dense_layers=[1])
    assert [attention.is_dense(layer) for layer in range(3)] == [False, True, False]
    attention.dense_layers = 1
    assert [attention.is_dense(layer) for layer in range(3)] == [True, False, False]
