"""Adapters for ComfyUI, judged by diffusers' own readers of the published names and stackings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import WAN, randomise

from longreel.data import files
from longreel.trainer.adapter import lora
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES
from longreel.trainer.sampling import comfyui
from longreel.trainer.sampling.comfyui import export_comfyui

HUNYUAN, MOCHI = FAMILIES["hunyuan"], FAMILIES["mochi"]
BLOCK = r"transformer_blocks\.\d+\."
DUAL = BLOCK + r"attn\."
DUAL_TEXT = DUAL + r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"  # and video
DUAL_MLP = BLOCK + r"(ff|ff_context)\.net\.(0\.proj|2)"


def trained(family, folder, *, rank=4, alpha=8, targets=None, transformer=None, model=None):
    """A transformer with an adapter that shows, which is saved to `folder`."""
    transformer = tiny.load_transformer(family) if transformer is None else transformer
    named = lora.attach(transformer, family, rank=rank, alpha=alpha, targets=targets)
    for module in transformer.modules():
        if hasattr(module, "lora_A"):  # of a transformer without weights, for one
            module.lora_A.to_empty(device="cpu")
            module.lora_B.to_empty(device="cpu")
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    randomise(named)
    model = {"path": str(model or tiny.folder(family)), "revision": None}
    lora.save(folder, transformer, family, {"version": 1, "family": family.name, "model": model})
    return transformer


def updates(transformer):
    """Return what PEFT would add to each adapted weight."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in transformer.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def products(state):
    """B @ A by layer."""
    layers = {name.rpartition(".lora_")[0] for name in state}
    assert state.keys() == {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    return {n: state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in layers}


def assert_updates(given, wanted):
    """Equal within fp32 rounding; a layer without an update may be there, as zeros."""
    assert wanted.keys() <= given.keys()
    for name, update in given.items():
        if name in wanted:
            assert torch.allclose(update, wanted[name], rtol=1e-5, atol=1e-6), name
        else:
            assert not update.any(), name


def copied_configs(family, folder, **changes):
    """A model's folder of JSON files alone, with another transformer."""
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(tiny.folder(family)) / name, folder / name)
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | changes))
    return folder


# Through diffusers' LoRA converters


@pytest.mark.parametrize(
    "family, targets",
    [
        (WAN, "attention"),
        (WAN, "attention+text"),
        (WAN, r"blocks\.[12]\.(attn1\.to_[qv]|attn2\.to_out\.0|ffn\.net\.(0\.proj|2))"),
        (HUNYUAN, DUAL + r"(to_[qkv]|to_out\.0)"),
        (HUNYUAN, DUAL_TEXT),
        (HUNYUAN, DUAL + r"(to_q|to_v|add_k_proj)|" + DUAL_MLP),
    ],
)
@pytest.mark.parametrize("rank, alpha", [(4, 8), (6, 2)])
def test_stock_pipelines_give_the_same_output(tmp_path, family, targets, rank, alpha):
    """Hunyuan without its single blocks, whose width is fixed in the converter: see below."""
    transformer = trained(family, tmp_path, rank=rank, alpha=alpha, targets=targets)
    file = export_comfyui(tmp_path)
    inputs = tiny.make_inputs(family)
    pipe = tiny.load_pipeline(family, text=False, vae=False)
    with torch.no_grad():
        bare = pipe.transformer(**inputs).sample
        wanted = transformer(**inputs).sample
        pipe.load_lora_weights(str(file), adapter_name="ours")
        loaded = pipe.transformer(**inputs).sample
    assert not torch.allclose(wanted, bare, atol=1e-2)
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)


def test_hunyuan_at_its_published_width(tmp_path):
    """All layers of one block of each kind, `linear1` of the single block included."""
    model = copied_configs(
        HUNYUAN,
        tmp_path / "model",
        num_attention_heads=24,
        attention_head_dim=128,
        rope_axes_dim=[16, 56, 56],
        num_layers=1,
        num_single_layers=1,
    )
    for targets in (
        rf"{DUAL_TEXT}|{DUAL_MLP}|single_{DUAL}to_[qkv]|single_{BLOCK}(proj_mlp|proj_out)",
        rf"{DUAL}(to_k|to_out\.0)|single_{DUAL}to_[kv]",
    ):
        transformer = trained(
            HUNYUAN,
            tmp_path,
            rank=2,
            targets=targets,
            transformer=HUNYUAN.loader.blank_transformer(str(model), None),
            model=model,
        )
        file = export_comfyui(tmp_path)
        state = HUNYUAN.names.pipeline_class.lora_state_dict(str(file))
        own = lora.state_dict(transformer)
        for tensors, scale in ((state, 1), (own, 8 / 2)):
            for name, tensor in tensors.items():  # a sixteenth of the inputs is enough, and quick
                tensors[name] = scale * tensor[:, ::16] if "lora_A" in name else tensor
        assert_updates(products(state), products(own))


# Through diffusers' checkpoint converters


class Checkpoint(dict):
    """Some weights of a checkpoint; a converter that pops another finds zeros."""

    def pop(self, key):
        return super().pop(key, torch.zeros(6, 2))


CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "mochi": single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers,
}


@pytest.mark.parametrize(
    "family, targets",
    [
        (WAN, "attention+text"),
        (WAN, r"blocks\.\d+\.ffn\.net\.(0\.proj|2)"),
        (HUNYUAN, f"{DUAL_MLP}|{DUAL_TEXT}"),
        (HUNYUAN, f"single_{BLOCK}proj_out"),
        *((MOCHI, targets) for targets in MOCHI.layers.lora_targets),
        (MOCHI, BLOCK + r"attn1\.(to_k|add_v_proj|to_add_out)"),
        (MOCHI, BLOCK + r"(ff|ff_context)\.net\.2"),
    ],
)
def test_updates_convert_as_weights_do(tmp_path, family, targets):
    """The updates as a checkpoint of the published layers: each becomes its diffusers layer's."""
    transformer = trained(family, tmp_path, targets=targets)
    layers = products(load_file(export_comfyui(tmp_path)))
    assert all(name.startswith("diffusion_model.") for name in layers)
    checkpoint = Checkpoint(
        {f"{name.removeprefix('diffusion_model.')}.weight": x for name, x in layers.items()}
    )
    converted = CONVERTERS[family.name](checkpoint)
    left = {} if converted is checkpoint else checkpoint
    assert not left, "names that the converter does not know"
    wanted = {f"{name}.weight": update for name, update in updates(transformer).items()}
    assert_updates(converted, wanted)


@pytest.mark.parametrize(
    "family, targets", [(name, t) for name, f in FAMILIES.items() for t in f.layers.lora_targets]
)
def test_every_named_choice_of_layers_can_be_exported(tmp_path, family, targets):
    trained(FAMILIES[family], tmp_path, targets=targets)
    assert export_comfyui(tmp_path).is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_name_layers_of_the_model_once(family):
    family = FAMILIES[family]
    transformer = family.loader.blank_transformer(tiny.folder(family), None)
    parts = [part for parts in family.layers.original.values() for part in parts]
    assert len(set(parts)) == len(parts)
    for part in parts:
        assert isinstance(transformer.get_submodule(part.format(0)), torch.nn.Linear)


# The file


def test_names_header_and_place_of_the_file(tmp_path):
    transformer = trained(HUNYUAN, tmp_path / "run", targets=DUAL + "to_[qv]")
    file = export_comfyui(tmp_path / "run")
    assert file == tmp_path / "run" / "run_comfyui.safetensors"
    assert {x.name for x in file.parent.iterdir()} == {lora.WEIGHTS, file.name}
    with safe_open(file, "pt") as content:
        assert content.metadata().keys() == {"longreel"}
    assert lora.read_entry(file) == lora.read_entry(tmp_path / "run")
    tensors = load_file(file)
    name = "diffusion_model.double_blocks.{}.img_attn_qkv.lora_{}.weight"
    assert tensors.keys() == {name.format(block, x) for block in (0, 1) for x in "AB"}
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    a, b = tensors[name.format(0, "A")], tensors[name.format(0, "B")]
    assert (a.shape, b.shape) == ((8, width), (3 * width, 8))  # the ranks of q and v; k has none
    assert not b[width : 2 * width].any() and a.dtype == b.dtype == torch.float32


def test_diffusers_still_takes_its_own_file_from_the_folder(tmp_path):
    transformer = trained(WAN, tmp_path)
    export_comfyui(tmp_path)
    state, metadata = WAN.names.pipeline_class.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == 8
    own = lora.state_dict(transformer)
    assert state.keys() == own.keys() and all(torch.equal(own[name], state[name]) for name in own)


def test_equal_adapters_give_equal_bytes(tmp_path):
    trained(WAN, tmp_path)
    first = export_comfyui(tmp_path, tmp_path / "a" / "1.safetensors")
    assert first.read_bytes() == export_comfyui(tmp_path, tmp_path / "2.safetensors").read_bytes()


def test_bf16_rounds_each_number_once(tmp_path):
    transformer = trained(WAN, tmp_path, rank=3, alpha=2)
    file = export_comfyui(tmp_path, dtype=torch.bfloat16)
    state = WAN.names.pipeline_class.lora_state_dict(str(file))
    own = lora.state_dict(transformer)
    assert state.keys() == own.keys()
    for name, tensor in own.items():
        scale = 2 / 3 if "lora_B" in name else 1
        assert torch.equal(state[name], (tensor * scale).bfloat16())


# Refusals


def assert_only_adapter(folder):
    assert [file.name for file in folder.iterdir()] == [lora.WEIGHTS]


@pytest.mark.parametrize(
    "family, targets, layer",
    [
        (WAN, r".*attn1\.to_q|condition_embedder\.text_embedder\.linear_\d", "text_embedder"),
        (WAN, r"proj_out", "proj_out"),
        (HUNYUAN, r".*\.attn\.to_q", "context_embedder.token_refiner.refiner_blocks.0.attn.to_q"),
        (MOCHI, r".*\.ff\.net\.0\.proj", "transformer_blocks.0.ff.net.0.proj"),
    ],
)
def test_layers_without_a_name_in_comfyui_are_listed(tmp_path, family, targets, layer):
    trained(family, tmp_path, targets=targets)
    with pytest.raises(ConfigError, match="cannot be exported") as error:
        export_comfyui(tmp_path)
    known, _, remedy = str(error.value).partition("Use it in diffusers")
    assert layer in known and "attn1.to_q" not in known
    assert "lora.targets, such as attention" in remedy
    assert_only_adapter(tmp_path)


Q, K = "blocks.{}.self_attn.q", "blocks.{}.self_attn.k"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda table: table.pop(Q), ConfigError, r"not known for blocks\.0\.attn1\.to_q"),
        (lambda table: table.update({"x.{}": table[Q]}), AssertionError, "a part of .*, x.0 in"),
        (lambda table: table.update({Q: (*table[Q], "y.{}")}), AssertionError, r"\['y\.0'\]: no"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, monkeypatch, change, error, message):
    trained(WAN, tmp_path)
    table = dict(WAN.layers.original)
    change(table)
    damaged = replace(WAN, layers=replace(WAN.layers, original=table))
    monkeypatch.setitem(FAMILIES, "wan", damaged)
    with pytest.raises(error, match=message):
        export_comfyui(tmp_path)
    assert_only_adapter(tmp_path)


def swapped(tensors):
    q, k = (f"diffusion_model.{name.format(1)}.lora_B.weight" for name in (Q, K))
    return tensors | {q: tensors[k], k: tensors[q]}


@pytest.mark.parametrize(
    "damage, message",
    [
        (swapped, r"differs in blocks\.1\.attn1\.to_k, blocks\.1\.attn1\.to_q"),
        (lambda tensors: dict(list(tensors.items())[1:]), r"blocks\.0\.self_attn\.q\.lora_A"),
        (lambda tensors: tensors | {"x": torch.ones(1)}, r"differs in x\."),
        (lambda tensors: {n: x.bfloat16().float() for n, x in tensors.items()}, "and 4 more"),
    ],
)
def test_what_was_written_is_read_back(tmp_path, monkeypatch, damage, message):
    trained(WAN, tmp_path)

    def write(path, tensors, about):
        files.save_tensors(path, damage(tensors), about)

    monkeypatch.setattr(comfyui, "save_tensors", write)
    with pytest.raises(RuntimeError, match=message):
        export_comfyui(tmp_path)
    assert_only_adapter(tmp_path)


def test_an_interrupted_export_leaves_the_file_before_it(tmp_path, monkeypatch):
    trained(WAN, tmp_path)
    before = export_comfyui(tmp_path).read_bytes()
    names = {file.name for file in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comfyui, "_check_written", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_comfyui(tmp_path, dtype=torch.bfloat16)
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / f"{tmp_path.name}_comfyui.safetensors").read_bytes() == before


def test_another_base_model_is_refused(tmp_path):
    trained(WAN, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a HunyuanVideoPipeline"):
        export_comfyui(tmp_path / "run", model_path=tiny.folder(HUNYUAN))
    shallow = copied_configs(WAN, tmp_path / "model", num_layers=2)
    with pytest.raises(ConfigError, match=r"does not fit this model[^$]*unexpected: .*blocks\.2\."):
        export_comfyui(tmp_path / "run", model_path=str(shallow))
    assert_only_adapter(tmp_path / "run")


def test_values_that_are_not_finite_are_refused(tmp_path):
    transformer = trained(WAN, tmp_path)
    with torch.no_grad():
        transformer.blocks[1].attn1.to_k.lora_B["default"].weight[0, 0] = float("nan")
    lora.save(tmp_path, transformer, WAN, lora.read_entry(tmp_path))
    with pytest.raises(ConfigError, match=r"not finite, in blocks\.1\.attn1\.to_k\."):
        export_comfyui(tmp_path)


def test_names_that_would_hide_an_adapter_are_refused(tmp_path):
    trained(WAN, tmp_path)
    own = (tmp_path / lora.WEIGHTS).rename(tmp_path / "own.safetensors")
    for name, message in (
        ("own.safetensors", "is the name of an adapter"),
        (lora.WEIGHTS, "is the name of an adapter"),
        ("x.pt", "must end in .safetensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_comfyui(own, tmp_path / name)
