"""The commands users type, on a GPU, on random weights of the published widths."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_waves

from longreel.data.decode import probe
from longreel.trainer.adapter import lora
from longreel.trainer.families import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wan_1_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks of the published width in the Hub's layout, with small VAE and text encoder."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, num_layers=8, ffn_dim=8960
        )
    tokenizer = ByT5Tokenizer(model_max_length=512)
    encoder = UMT5Config(
        vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=4
    )
    folder = tmp_path_factory.mktemp("wan_1_3b")
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder),
        vae=AutoencoderKLWan(base_dim=16, z_dim=16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer.to(torch.bfloat16),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dual and one single block of the published width; all else as in the tiny model."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    pipe = FAMILIES["hunyuan"].loader.build_tiny()
    small = {
        name: pipe.transformer.config[name]
        for name in ("in_channels", "out_channels", "text_embed_dim", "pooled_projection_dim")
    }
    with torch.device("cuda"):
        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, **small)
    pipe.register_modules(transformer=transformer.to(torch.bfloat16))
    folder = tmp_path_factory.mktemp("hunyuan")
    pipe.save_pretrained(folder)
    return folder


def launch(command: list[str]) -> str:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout[-3500:])
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def train(tmp_path: Path, *settings: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", *settings]
    command += [f"cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    command += ["train.warmup=2", "log.wandb=false", "validate.every=100", "validate.steps=2"]
    output = launch(command)
    assert "Attention backend on cuda: triton" in output and "n/a" not in output
    assert "The trial step fits" in output
    return output


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_wan(wan_1_3b: Path, tmp_path: Path):
    """161 frames of 480 x 832: caches, trains three steps, stops, goes on to five, samples."""
    settings = ["recipe=wan_1_3b_2x", f"model.path={wan_1_3b}", "checkpoint.every=3"]
    settings += [f"data.path={write_waves(tmp_path, 2, 161, 480, 832, 16)}", "train.lr=0.0003"]
    train(tmp_path, *settings, "train.steps=3", "validate.prompts=[]")
    resumed = train(tmp_path, *settings, "train.steps=5", "validate.prompts=a wave")
    assert "Resuming from" in resumed
    losses = column(tmp_path / "run", "loss")
    assert len(losses) == 5 and np.isfinite(losses).all()
    heldout = column(tmp_path / "run", "heldout_loss_target")
    assert len(heldout) == 3 and heldout[-1] < heldout[0]
    assert lora.read_entry(tmp_path / "run")["frames"] == 161
    assert (tmp_path / "run/samples/step-000005-0.mp4").stat().st_size > 10_000


def test_hunyuan(hunyuan: Path, tmp_path: Path):
    """253 frames of 720 x 1280, 230,400 tokens and text; then the adapter samples by command.

    All layers are sparse, since a dense one would take most of a step: test_wan has two.
    """
    settings = ["recipe=hunyuan_2x", f"model.path={hunyuan}", "sparse.dense_layers=0"]
    settings += [
        f"data.path={write_waves(tmp_path, 2, 255, 180, 320, 24)}",
        "validate.sigmas=[0.5]",
        "data.least_scale=0.25",
        "validate.prompts=[]",
    ]
    train(tmp_path, *settings, "train.steps=2", "train.caption_dropout=0.3")
    losses = column(tmp_path / "run", "loss")
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert len(column(tmp_path / "run", "heldout_loss_target")) == 2
    out = tmp_path / "sample.mp4"
    command = [sys.executable, "-c", "from longreel.launch.commands import main; main()", "sample"]
    launch([*command, f"lora={tmp_path / 'run'}", "prompt=a wave", "steps=2", f"out={out}"])
    assert probe(out).duration == pytest.approx(253 / 24, abs=0.1)
