"""Adapters: what is trained, and files that stock diffusers and a resumed run read back exactly."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import WAN, randomise

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.adapter import lora
from longreel.trainer.config.values import ConfigError

ENTRY = {"version": 1, "family": "wan", "pattern": {"name": "radial", "decay": 0.5}, "fps": 16}


def adapted(rank=4, alpha=None, seed=0, **options):
    """A tiny transformer with an adapter that shows, installed as in training."""
    transformer = tiny.load_transformer(WAN)
    randomise(lora.attach(transformer, WAN, rank=rank, alpha=alpha, **options), seed=seed)
    WAN.install(transformer, SparseAttention(Dense()))
    return transformer


def test_only_fp32_self_attention_adapters_are_trained():
    transformer = tiny.load_transformer(WAN, torch.bfloat16)
    inputs = tiny.make_inputs(WAN, dtype=torch.bfloat16)
    before = transformer(**inputs).sample
    named = lora.attach(transformer, WAN, rank=4, seed=0)
    assert len(named) == 3 * 4 * 2  # layers, projections, A and B
    assert all(".attn1." in name and "lora_" in name for name, _ in named)
    assert all(parameter.dtype == torch.float32 for _, parameter in named)
    trainable = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in named}
    out = transformer(**inputs).sample
    assert torch.equal(out, before)  # a new adapter changes nothing
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in named)


def test_seed_decides_the_weights_and_leaves_the_global_state_alone():
    transformers = [tiny.load_transformer(WAN) for _ in range(3)]
    state = torch.random.get_rng_state()
    first, same, other = (
        dict(lora.attach(transformer, WAN, rank=2, seed=seed))
        for transformer, seed in zip(transformers, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "targets, message",
    [
        (r"blocks\.\d+\.attn3\.to_q", "matches no module"),
        (r"blocks\.0", "not linear"),
        (r"blocks(", "not a regular expression"),
    ],
)
def test_targets_that_match_nothing_useful_are_named(targets, message):
    with pytest.raises(ConfigError, match=message) as error:
        lora.attach(tiny.load_transformer(WAN), WAN, rank=2, targets=targets)
    assert f"lora.targets={targets}" in str(error.value)


def test_targets_of_a_recipe():
    named = lora.attach(tiny.load_transformer(WAN), WAN, rank=2, targets=r".*\.attn2\.(to_k|to_v)")
    assert len(named) == 3 * 2 * 2


@pytest.mark.parametrize("rank, alpha", [(4, None), (4, 8), (3, 1.5)])
def test_stock_diffusers_gives_the_same_output(tmp_path, rank, alpha):
    trained = adapted(rank, alpha)
    lora.save(tmp_path, trained, WAN, ENTRY)
    pipe = tiny.load_pipeline(WAN)
    inputs = tiny.make_inputs(WAN)
    bare = pipe.transformer(**inputs).sample
    pipe.load_lora_weights(tmp_path, adapter_name="ours")
    loaded = pipe.transformer(**inputs).sample
    assert torch.equal(loaded, trained(**inputs).sample)
    assert not torch.allclose(loaded, bare, atol=1e-2)
    pipe.set_adapters("ours", 0.0)
    assert torch.equal(pipe.transformer(**inputs).sample, bare)


def test_a_loaded_adapter_samples_without_dropout(tmp_path):
    """Stock diffusers builds it with the dropout on record, switched on."""
    lora.save(tmp_path, adapted(dropout=0.5).eval(), WAN, ENTRY)
    pipe = tiny.load_pipeline(WAN)
    pipe.load_lora_weights(tmp_path)
    inputs = tiny.make_inputs(WAN)
    assert torch.equal(pipe.transformer(**inputs).sample, pipe.transformer(**inputs).sample)


def test_stock_diffusers_in_bf16_is_within_the_trained_model_s_own_error(tmp_path):
    """diffusers rounds the adapter to the base's bf16, which training keeps in fp32."""
    trained = tiny.load_transformer(WAN, torch.bfloat16)
    randomise(lora.attach(trained, WAN, rank=4), seed=0)
    lora.save(tmp_path, trained, WAN, ENTRY)
    exact = tiny.load_transformer(WAN)
    exact.load_state_dict(tiny.load_transformer(WAN, torch.bfloat16).state_dict())
    randomise(lora.attach(exact, WAN, rank=4), seed=0)
    pipe = tiny.load_pipeline(WAN, tiny.load_transformer(WAN, torch.bfloat16))
    pipe.load_lora_weights(tmp_path)
    inputs, rounded = tiny.make_inputs(WAN), tiny.make_inputs(WAN, dtype=torch.bfloat16)
    with torch.no_grad():
        oracle = exact(**inputs).sample
        own = (trained(**rounded).sample - oracle).norm()
        loaded = (pipe.transformer(**rounded).sample - oracle).norm()
    assert 0 < loaded <= 2 * own


def test_names_and_header_of_the_file(tmp_path):
    file = lora.save(tmp_path, adapted(), WAN, ENTRY)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    assert list(tmp_path.iterdir()) == [file]
    tensors = load_file(file)
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in tensors and len(tensors) == 24
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert set(metadata) == {"format", "lora_adapter_metadata", "longreel"}
    assert json.loads(metadata["longreel"]) == ENTRY == lora.read_entry(tmp_path)


def test_equal_adapters_give_equal_bytes(tmp_path):
    first, second, other = (
        lora.save(tmp_path / str(i), adapted(seed=seed), WAN, ENTRY).read_bytes()
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second != other


def test_a_failed_save_leaves_the_file_before_it(tmp_path, monkeypatch):
    before = lora.save(tmp_path, adapted(), WAN, ENTRY).read_bytes()
    with pytest.raises(TypeError):
        lora.save(tmp_path, adapted(seed=1), WAN, {"not json": object()})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


FIRST = "transformer.blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({FIRST: t[FIRST][:2].clone()}),
            r"another shape: \S+ \(2, 32\) for \(4, 32\)",
        ),
        (
            lambda t: t.update({"transformer.head.lora_A.weight": t[FIRST].clone()}),
            "unexpected: .*head",
        ),
        (lambda t: t.pop(FIRST), "missing: " + FIRST.replace(".", r"\.")),
    ],
)
def test_adapters_that_do_not_fit_are_listed(tmp_path, change, message):
    """diffusers would load the rest and warn."""
    file = lora.save(tmp_path, adapted(), WAN, ENTRY)
    lora.check_fits(tiny.load_transformer(WAN), tmp_path)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        lora.check_fits(tiny.load_transformer(WAN), file)


def test_files_that_are_not_our_adapters(tmp_path):
    with pytest.raises(ConfigError, match="holds no adapter"):
        lora.read_entry(tmp_path)
    step = tmp_path / "checkpoints" / "step-2"
    lora.save(step, adapted(), WAN, ENTRY)
    with pytest.raises(ConfigError, match="Below it: .*step-2"):
        lora.read_entry(tmp_path)

    shutil.copyfile(step / lora.WEIGHTS, tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        lora.read_entry(tmp_path / "cut.safetensors")

    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not written by longreel"):
        lora.read_entry(tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match="does not record its rank"):
        lora.check_fits(tiny.load_transformer(WAN), tmp_path / "foreign.safetensors")

    newer = lora.save(tmp_path / "newer", adapted(), WAN, ENTRY | {"version": 3})
    with pytest.raises(ConfigError, match="newer longreel"):
        lora.read_entry(newer)
