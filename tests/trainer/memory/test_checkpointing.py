"""Methods that save memory change nothing else: each method against the plain model."""

import gc
import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import forward_backward, make_inputs, randomise
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Radial
from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Memory
from longreel.trainer.families import FAMILIES
from longreel.trainer.memory.checkpointing import block_checkpoint
from longreel.trainer.memory.offload import Offload, PlainCopies

FP32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
PLAIN = Memory(recompute="none")
PAGE = 512  # bytes: the tiny models' tensors take several, their modulation does not
SPARSE = torch.ops.longreel.block_sparse_attention.default
SPARSE_BACKWARD = torch.ops.longreel.block_sparse_attention_backward.default
DENSE = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def build(family, memory, *, dtype=FP32, dropout=0.1, targets=None, page=PAGE):
    """A transformer in training as the loop sets it up, its first layer dense, and its offload."""
    transformer = tiny.load_transformer(family, dtype)
    randomise(lora.attach(transformer, family, rank=4, dropout=dropout, targets=targets))
    attention = SparseAttention(Radial(), block=16, dense_layers=1)
    family.install(transformer, attention)
    if memory.mlp_chunk:
        family.blocks.chunk_mlp(transformer, memory.mlp_chunk)
    blocks = block_checkpoint(memory, attention, CPU)
    if blocks is None:
        return transformer.train(), None
    if memory.offload:
        blocks.offload = Offload(CPU, keep=memory.offload_keep, page=page)
    transformer.enable_gradient_checkpointing(blocks)
    return transformer.train(), blocks.offload


def run(family, memory, *, dtype=FP32, copies=None, **options):
    """Output and gradients of two captions of different lengths."""
    transformer, offload = build(family, memory, dtype=dtype, **options)
    if copies is not None:
        assert offload is not None
        offload.copies = copies
    torch.manual_seed(0)  # of dropout
    return forward_backward(transformer, make_inputs(family, texts=(3, 7), dtype=dtype))


def assert_bit_equal(got, expected):
    (out, grads), (expected_out, expected_grads) = got, expected
    assert torch.equal(out, expected_out)
    assert grads.keys() == expected_grads.keys() and any(g.any() for g in grads.values())
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())


class Watching(TorchDispatchMode):
    """Counts calls. Backward on a CPU runs in the thread that asks for it, so it is seen too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


CHECKPOINTS = [
    *(Memory(recompute=name) for name in ("all", "all_but_attention")),
    *(
        Memory(recompute=name, offload=True, offload_keep=keep)
        for name in ("all", "all_but_attention")
        for keep in (0, 1, 2, 100)
    ),
]


def shown(memory):
    return f"{memory.recompute}-{memory.offload_keep if memory.offload else 'on device'}"


# Checkpointing


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("memory", CHECKPOINTS, ids=shown)
def test_checkpointing_and_offload_are_bit_equal(family, memory, dtype):
    """They are with LoRA and its dropout, whose random numbers are drawn again as they were."""
    assert_bit_equal(run(family, memory, dtype=dtype), run(family, PLAIN, dtype=dtype))


@pytest.mark.parametrize("memory", CHECKPOINTS, ids=shown)
def test_attention_is_computed_as_often_as_the_setting_says(family, memory):
    transformer, _ = build(family, memory)
    inputs = make_inputs(family, texts=(4, 4))
    with Watching() as watching:
        forward_backward(transformer, inputs)
    layers = family.read_geometry(tiny.folder(family)).layers
    times = 2 if memory.recompute == "all" else 1
    assert watching.calls[SPARSE] == times * (layers - 1)
    assert watching.calls[SPARSE_BACKWARD] == layers - 1
    # Beside the dense layer: Wan attends to captions, HunyuanVideo refines and Mochi pools them.
    captions = {"wan": 2 * layers, "hunyuan": 1, "mochi": 1}[family.name]
    assert watching.calls[DENSE] == times + captions


@pytest.mark.parametrize("memory", CHECKPOINTS, ids=shown)
def test_two_forwards_before_one_backward(family, memory):
    """On other grids; the second is sent out while the first waits."""

    def gradients(memory):
        transformer, _ = build(family, memory, dropout=0)
        total = 0
        for seed, (frames, texts) in enumerate([(13, (9,)), (9, (2,))]):
            out = transformer(**make_inputs(family, frames, texts=texts, seed=seed)).sample
            total = total + out.square().sum()
        total.backward()
        return {n: p.grad for n, p in transformer.named_parameters() if p.requires_grad}

    got, expected = gradients(memory), gradients(PLAIN)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("memory", CHECKPOINTS, ids=shown)
def test_backward_runs_twice(family, memory):
    transformer, _ = build(family, memory)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    loss = transformer(**make_inputs(family)).sample.square().sum()
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    twice = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, once, twice))


# Offload


class LateCopies(PlainCopies):
    """Copies nothing before it is waited for, which is the latest that a GPU may be."""

    def to_host(self, pieces):
        return [(page, piece) for page, piece in pieces]

    def to_device(self, pieces):
        pairs = [(piece, page) for page, piece in pieces]
        for piece, _ in pairs:
            piece.fill_(0xFF)  # NaN
        return pairs

    def wait(self, copied):
        for target, source in copied or ():
            target.copy_(source)
        if copied:
            copied.clear()


class NeverWaiting(LateCopies):
    def wait(self, copied):
        pass


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_nothing_is_read_before_its_copy_is_waited_for(family, recompute, keep):
    memory = Memory(recompute=recompute, offload=True, offload_keep=keep)
    assert_bit_equal(run(family, memory, copies=LateCopies()), run(family, PLAIN))


def test_late_copies_show_a_wait_that_is_missing():
    memory = Memory(offload=True, offload_keep=0)
    _, grads = run(tiny.WAN, memory, copies=NeverWaiting())
    assert any(grad.isnan().any() for grad in grads.values())


def stored(offload):
    return [block for _, block in sorted(offload._blocks.items())]


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_the_last_blocks_stay_and_the_others_are_in_the_pool_only(family, recompute, keep):
    memory = Memory(recompute=recompute, offload=True, offload_keep=keep)
    transformer, offload = build(family, memory)
    out = transformer(**make_inputs(family, texts=(3, 7))).sample
    blocks = stored(offload)
    layers = family.read_geometry(tiny.folder(family)).layers
    assert len(blocks) == layers
    sent = layers - keep
    assert [block.away for block in blocks] == [True] * (sent - 1) + [False] * (keep + 1)
    assert all(not block.tensors for block in blocks[: sent - 1])
    assert all(block.tensors for block in blocks[sent - 1 :])
    assert [bool(block.pages) for block in blocks] == [True] * sent + [False] * keep
    # Video tokens as the block takes them; attention's result beside it, as large.
    config = tiny.load_config(family)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    video = 2 * 9 * 3 * 5 * width * 4
    least = (2 if recompute == "all_but_attention" else 1) * video * sent
    used = offload.pool.size - len(offload.pool._free) * PAGE
    captions = 2 * 512 * width * 4 * sent if family.name == "wan" else 0
    assert least <= used <= 1.3 * least + captions
    del blocks
    out.sum().backward()
    assert not stored(offload) and len(offload.pool._free) * PAGE == offload.pool.size


def test_the_pool_grows_in_the_first_step_alone(family):
    transformer, offload = build(family, Memory(recompute="all_but_attention", offload=True))
    sizes = []
    for seed in range(3):
        forward_backward(transformer, make_inputs(family, texts=(3, 7), seed=seed))
        sizes.append(offload.pool.size)
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_a_graph_without_a_backward_gives_its_memory_back(family):
    transformer, offload = build(family, Memory(recompute="all_but_attention", offload=True))
    out = transformer(**make_inputs(family))
    assert stored(offload) and len(offload.pool._free) * PAGE < offload.pool.size
    del out
    gc.collect()
    assert not stored(offload) and len(offload.pool._free) * PAGE == offload.pool.size


def test_a_forward_without_gradients_stores_nothing(family):
    transformer, offload = build(family, Memory(offload=True))
    with torch.no_grad():
        transformer(**make_inputs(family))
    assert offload.pool.size == 0 and not stored(offload)


def test_a_small_part_of_a_large_tensor_does_not_hold_it():
    """The text that follows a single-stream block's video is a view of both."""
    offload = Offload(CPU, keep=0, page=1024)
    joint = torch.randn(1, 100, 16)
    video, text = joint.split([90, 10], dim=1)
    alone = torch.randn(4)
    with offload.block() as block:
        backs = [block.keep(x) for x in (video, text, alone)]
    assert len(block.tensors) == 1
    for back, x in zip(backs, (video, text, alone), strict=True):
        assert torch.equal(back(), x)
    assert backs[1]().untyped_storage().nbytes() == text.nbytes
    assert backs[2]().data_ptr() == alone.data_ptr()


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.bool])
def test_any_layout_comes_back_as_it_was(dtype):
    """Dense ones with their strides; gaps close."""
    x = torch.randn(2, 60, 3, 8).to(dtype)
    views = [x, x.transpose(1, 2), x[:, :50], x[:1, :50], x[:, :50].transpose(1, 2), x[..., ::2]]
    offload = Offload(CPU, keep=0, page=100)
    with offload.block() as block:
        backs = [block.keep(view) for view in views]
    with offload.block():
        pass
    assert block.away
    for back, view in zip(backs, views, strict=True):
        assert torch.equal(back(), view) and back().dtype == dtype
        assert back().stride() == view.clone().stride() or len(view) == 1


def test_a_pool_that_cannot_grow_says_what_it_has(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore")

    offload = Offload(CPU, keep=0, page=64)
    offload.pool.take(1)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"memory.offload holds 0\.0 GiB .*CUDA error: out of"):
        offload.pool.take(10**6)


# MLP chunks


@pytest.fixture
def fused(family):
    """LoRA targets inside of what is chunked."""
    return {
        "wan": r"blocks\.\d+\.(attn1\.to_q|ffn\.net\.(0\.proj|2))",
        "hunyuan": r"(single_)?transformer_blocks\.\d+\."
        r"(attn\.to_q|proj_mlp|proj_out|ff\.net\.(0\.proj|2))",
        "mochi": r"transformer_blocks\.\d+\.(attn1\.to_q|ff\.net\.(0\.proj|2))",
    }[family.name]


def error(got, exact):
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tokens", [7, 64, 10_000])
@pytest.mark.parametrize("memory", [PLAIN, *CHECKPOINTS[:2], CHECKPOINTS[-3]], ids=shown)
def test_mlp_chunks_are_within_the_plain_model_s_own_error(family, fused, memory, tokens):
    exact, exact_grads = run(family, PLAIN, dtype=torch.float64, dropout=0, targets=fused)
    plain, plain_grads = run(family, PLAIN, dropout=0, targets=fused)
    memory = replace(memory, mlp_chunk=tokens)
    out, grads = run(family, memory, dropout=0, targets=fused)
    assert error(out, exact) <= 2 * error(plain, exact)
    assert grads.keys() == exact_grads.keys() and any("net" in name for name in grads)
    for name, grad in exact_grads.items():
        if grad.any():
            assert error(grads[name], grad) <= 3 * error(plain_grads[name], grad) + 1e-7, name


def test_one_chunk_is_bit_equal(family):
    assert_bit_equal(run(family, replace(PLAIN, mlp_chunk=1000)), run(family, PLAIN))


def test_chunks_with_dropout_elsewhere_are_as_without(family):
    """The MLP draws no random numbers of its own, so attention's stay where they are."""
    plain, plain_grads = run(family, PLAIN)
    out, grads = run(family, Memory(recompute="all_but_attention", offload=True, mlp_chunk=16))
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_dropout_within_chunks_is_drawn_again_as_it_was(family, fused):
    """Recomputed once or twice, the masks are those of the forward."""
    runs = [
        run(family, Memory(recompute=name, mlp_chunk=16), targets=fused)
        for name in ("none", "all", "all_but_attention")
    ]
    for got in runs[1:]:
        assert_bit_equal(got, runs[0])


@pytest.mark.parametrize("recompute", ["none", "all", "all_but_attention"])
def test_the_inside_of_an_mlp_is_never_longer_than_a_chunk(family, recompute):
    """It is so in no pass: activations between projections, and the inputs of the last of them."""
    inside = re.compile(r"\w*blocks\.\d+\.(ffn?\.net\.[02]|act_mlp|proj_out)")

    def longest(chunk):
        transformer, _ = build(family, Memory(recompute=recompute, mlp_chunk=chunk))
        rows = Counter()
        for name, module in transformer.named_modules():
            if inside.fullmatch(name):
                module.register_forward_hook(
                    lambda module, args, out, name=name: rows.update({(name, args[0].shape[1])})
                )
        forward_backward(transformer, make_inputs(family, texts=(4, 4)))
        return rows

    tokens, layers = 9 * 3 * 5, family.read_geometry(tiny.folder(family)).layers
    assert max(length for _, length in longest(0)) >= tokens
    chunks = longest(16)
    assert len({name for name, _ in chunks}) == 2 * layers
    assert max(length for _, length in chunks) == 16
    # Forward, recomputed by itself, and within a checkpointed block once more.
    times = max(count for (_, length), count in chunks.items() if length == 16)
    assert times == (2 if recompute == "none" else 3) * (tokens // 16)


def test_chunks_hold_less_for_backward(family):
    """Blocks without recomputation keep an MLP's input in place of its inside."""

    def held(chunk):
        transformer, _ = build(family, replace(PLAIN, mlp_chunk=chunk), dropout=0)
        weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
        sizes = {}

        def pack(x):
            memory = x.untyped_storage()
            if memory.data_ptr() not in weights:
                sizes[memory.data_ptr()] = memory.nbytes()
            return x  # holds it, so that no address comes twice

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = transformer(**make_inputs(family, frames=25))
        del out
        return sum(sizes.values())

    geometry = family.read_geometry(tiny.folder(family))
    width = geometry.heads * geometry.head_dim
    # A GELU saves what it is given, twice the model's width here (four times when published). In a
    # single-stream block two tensors of the model's width take its place.
    layers = 2 if family.name == "hunyuan" else geometry.layers
    assert held(0) - held(16) >= 0.95 * layers * 25 * 3 * 5 * width * 4


def test_chunking_leaves_names_as_they_are(family, fused, tmp_path):
    stock = tiny.load_transformer(family)
    names, modules = list(stock.state_dict()), {n for n, _ in stock.named_modules()}
    chunked = tiny.load_transformer(family)
    family.blocks.chunk_mlp(chunked, 16)
    assert (
        list(chunked.state_dict()) == names and {n for n, _ in chunked.named_modules()} == modules
    )
    randomise(lora.attach(chunked, family, rank=4, targets=fused))  # PEFT after chunking
    family.install(chunked, SparseAttention(Radial(), block=16, dense_layers=1))
    lora.save(tmp_path, chunked, family, {"version": 1})
    pipe = tiny.load_pipeline(family, vae=False)
    pipe.load_lora_weights(tmp_path)
    family.install(pipe.transformer, SparseAttention(Radial(), block=16, dense_layers=1))
    inputs = make_inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked(**inputs).sample, pipe.transformer(**inputs).sample, rtol=1e-4, atol=1e-5
        )


def test_every_combination_gives_the_same_loss_and_gradients(family):
    plain, plain_grads = run(family, PLAIN, dropout=0)
    for name, offload, chunk in itertools.product(
        ("all", "all_but_attention"), (False, True), (0, 20)
    ):
        memory = Memory(recompute=name, offload=offload, mlp_chunk=chunk)
        out, grads = run(family, memory, dropout=0)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
        for key, grad in plain_grads.items():
            torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-4, msg=key)
