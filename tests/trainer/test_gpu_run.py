"""The command users type, on a GPU: Wan 1.3B at full width, random weights, 161 frames."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longreel.data.decode import write_video
from longreel.trainer import lora

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wan_1_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model's shapes in the Hub's layout, but for small VAE and text encoder."""
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
            num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960
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
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    y, x = np.mgrid[:480, :832].astype(np.float32)
    for index in range(2):
        waves = (
            np.stack(
                [np.sin((x + 4 * t) / (40 + 9 * c + index)) * np.cos(y / 60) for c in range(3)]
            )
            for t in range(161)
        )
        frames = ((127 + 100 * wave).astype(np.uint8).transpose(1, 2, 0) for wave in waves)
        write_video(folder / f"{index}.mp4", frames, 16)
        (folder / f"{index}.txt").write_text(f"waves number {index}")
    return folder


def test_accelerate_launch(wan_1_3b: Path, videos: Path, tmp_path: Path):
    """Caches, trains five steps, stops, goes on to seven, samples at the target length."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py"]
    command += ["recipe=wan_1_3b_2x", f"model.path={wan_1_3b}", f"data.path={videos}"]
    command += [f"cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    command += ["train.warmup=2", "log.wandb=false", "validate.every=100", "validate.steps=2"]
    command += ["validate.prompts=a wave", "checkpoint.every=5"]
    for steps in (5, 7):
        run = subprocess.run(
            [*command, f"train.steps={steps}"], cwd=ROOT, capture_output=True, text=True
        )
        print(run.stdout[-3500:])
        assert run.returncode == 0, run.stderr[-3000:]
        assert "Attention backend on cuda: triton" in run.stdout
        assert "n/a" not in run.stdout
    assert "Resuming from" in run.stdout
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 7 and np.isfinite(losses).all()
    heldout = [float(row["heldout_loss_target"]) for row in rows if row["heldout_loss_target"]]
    assert len(heldout) == 3 and heldout[-1] < heldout[0]
    assert lora.read_entry(tmp_path / "run")["frames"] == 161
    assert (tmp_path / "run/samples/step-000007-0.mp4").stat().st_size > 10_000
