"""Figures of attention, chunked and sampled, against computing them directly."""

import json

import pytest
import torch
from tiny import WAN, load_transformer, make_inputs

from longreel.sparse.analyze import Observer, fit_decay, summary
from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense, LongLora, Radial, Spatial, Temporal

GRID = TokenGrid(5, 4, 6, 3)
MASKS = {"radial": Radial(), "temporal": Temporal(half_width=1.0), "longlora": LongLora(share=0.3)}


def tensors(grid=GRID, heads=4, dim=16, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(batch, len(grid), heads, dim, generator=generator) for _ in range(3)]


def observe(q, k, v, grid=GRID, **settings):
    observer = Observer(Dense(), block=16, masks=MASKS, **settings)
    observer.plan(grid)
    out = observer.attention(0, q, k, v)
    return observer.found[0], out


def direct(q, k):
    return (torch.einsum("qhd,khd->hqk", q[0], k[0]) * q.shape[-1] ** -0.5).softmax(-1)


@pytest.mark.parametrize("chunk", [1, 4 * 4 * len(GRID) * 7, 1 << 28])
def test_energy_is_the_mean_score_at_each_distance(chunk):
    """Against loops over all pairs, whatever the chunks."""
    q, k, v = tensors()
    found, _ = observe(q, k, v, rows=0, positions=10, chunk=chunk)
    scores, s = direct(q, k), GRID.per_frame
    temporal = [[] for _ in range(GRID.frames)]
    spatial = [[] for _ in range(10)]
    for a in range(GRID.video):
        for b in range(GRID.video):
            if a % s == b % s:
                temporal[abs(a // s - b // s)].append(scores[:, a, b])
            if a // s == b // s and abs(a - b) < 10:
                spatial[abs(a - b)].append(scores[:, a, b])
    for energy, pairs in ((found.temporal, temporal), (found.spatial, spatial)):
        want = torch.stack([torch.stack(group).mean(0) for group in pairs], 1)
        torch.testing.assert_close(energy.mean().float(), want)


@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_masks_are_judged_as_the_kernel_computes_them(chunk):
    """The output error against the sparse attention itself; the recall against its blocks."""
    q, k, v = tensors()
    found, out = observe(q, k, v, rows=0, chunk=chunk)
    scores, video = direct(q, k), GRID.video
    for name, pattern in MASKS.items():
        sparse = SparseAttention(pattern, block=16, backend="reference")
        sparse.plan(GRID)
        got = sparse.attention(0, q, k, v)[0, :video].transpose(0, 1)
        dense = out[0, :video].transpose(0, 1)
        want = ((got - dense) ** 2).sum((1, 2)) / (dense**2).sum((1, 2))
        loss = found.masks[name]
        torch.testing.assert_close(loss.relative_mse.float(), want, rtol=1e-4, atol=1e-7)
        # A value that counts kept mass: ones, and nothing else, at the kept keys.
        ones = torch.eye(len(GRID), 128)[None, :, None].expand(1, -1, 4, -1)
        wide = SparseAttention(pattern, block=16, backend="reference")
        wide.plan(GRID)
        pad = torch.nn.functional.pad
        kept = wide.attention(0, *(pad(x, (0, 128 - 16)) for x in (q, k)), ones)[0]
        kept = kept.transpose(0, 1)[..., : len(GRID)] > 0
        recall = (scores * kept)[:, :video].sum(-1).mean(-1)
        torch.testing.assert_close(loss.recall.float(), recall, rtol=1e-4, atol=1e-6)
        assert recall.min() > 0 and recall.max() < 1


def test_the_output_is_the_attention_s_own():
    q, k, v = tensors()
    plain = SparseAttention(Spatial(half_width=1.0), block=16, backend="reference")
    watched = Observer(plain.pattern, block=16, backend="reference", masks=MASKS)
    for attention in (plain, watched):
        attention.plan(GRID)
    assert torch.equal(plain.attention(0, q, k, v), watched.attention(0, q, k, v))


def test_sampled_rows_estimate_all_and_do_not_change_from_call_to_call():
    grid = TokenGrid(9, 8, 8)
    q, k, v = tensors(grid)
    everything, _ = observe(q, k, v, grid, rows=0)
    some, _ = observe(q, k, v, grid, rows=200)
    again, _ = observe(q, k, v, grid, rows=200)
    assert torch.equal(some.temporal.total, again.temporal.total)
    assert some.masks["radial"].rows == 200
    torch.testing.assert_close(
        some.masks["radial"].recall, everything.masks["radial"].recall, rtol=0.1, atol=0.02
    )


def test_padded_keys_do_not_count():
    """A sample whose text is shorter is one of a shorter sequence."""
    q, k, v = tensors(batch=1)
    padded, short = Observer(Dense(), block=16, rows=0), Observer(Dense(), block=16, rows=0)
    end = len(GRID) - 2
    padded.plan(GRID, valid=[end])
    padded.attention(0, q, k, v)
    short.plan(TokenGrid(5, 4, 6, 1))
    short.attention(0, *(x[:, :end] for x in (q, k, v)))
    torch.testing.assert_close(padded.found[0].temporal.mean(), short.found[0].temporal.mean())


@pytest.mark.parametrize("a, b", [(0.3, -2.0), (2.5, 0.1), (0.0, -1.0), (-0.05, -3.0)])
def test_a_decay_is_found_again(a, b):
    x = torch.arange(18)
    fit = fit_decay(x, torch.exp(-a * x.double() + b))
    assert (fit.a, fit.b) == pytest.approx((a, b), abs=2e-4)
    if a:
        assert fit.r2 == pytest.approx(1, abs=1e-6)


def test_r2_says_how_well_it_fits():
    """On a curve that does not decay so: by its definition, and no neighbour fits better."""
    x = torch.arange(20).double()
    y = 1 / (1 + x)
    fit = fit_decay(x, y)
    found = y - torch.exp(-fit.a * x + fit.b)
    assert fit.r2 == pytest.approx(float(1 - (found**2).sum() / ((y - y.mean()) ** 2).sum()))
    assert 0.9 < fit.r2 < 0.985
    for a, b in ((fit.a * 1.05, fit.b), (fit.a, fit.b + 0.05), (fit.a * 0.95, fit.b)):
        assert ((y - torch.exp(-a * x + b)) ** 2).sum() > (found**2).sum()


def test_a_model_is_observed_layer_by_layer():
    transformer = load_transformer(WAN)
    observer = Observer(Dense(), block=16, masks=MASKS, layers=[0, 2], rows=32)
    WAN.install(transformer, observer)
    with torch.no_grad():
        transformer(**make_inputs(WAN), return_dict=False)
    assert sorted(observer.found) == [0, 2]
    figures = summary(observer, dict.fromkeys(MASKS, 0.5))
    assert json.loads(json.dumps(figures)) == figures
    assert figures["decay"]["temporal"]["heads"] == 4  # two layers of two heads
    assert len(figures["layers"]["0"]["temporal"]["energy"][0]) == 9
    assert 0 < figures["masks"]["radial"]["recall"] <= 1
