"""The `longreel` command."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import WAN, randomise

from longreel.data.decode import probe, read_clip
from longreel.launch.commands import main
from longreel.sparse.patterns import Radial
from longreel.trainer.adapter import lora
from longreel.trainer.config.values import ConfigError
from longreel.trainer.parallel.sequence import join_all
from longreel.trainer.sampling import pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an adapter for the tiny Wan."""
    folder = tmp_path_factory.mktemp("run")
    transformer = tiny.load_transformer(WAN)
    randomise(lora.attach(transformer, WAN, rank=4))
    entry = {
        "version": 1,
        "family": "wan",
        "model": {"path": "tiny", "revision": None},
        "pattern": {"name": "radial", **dataclasses.asdict(Radial())},
        "block": 16,
        "dense_layers": 1,
        "dense_steps": 1,
        "native_frames": 9,
        "frames": 17,
        "height": 64,
        "width": 48,
        "fps": 16,
    }
    lora.save(folder, transformer, WAN, entry)
    return folder


@pytest.fixture
def sample(run: Path, tmp_path: Path):
    def command(*options: str) -> Path:
        given = ["sample", f"lora={run}", f"cache={tmp_path}", f"out={tmp_path / 'a.mp4'}"]
        main([*given, "prompt=a cat: #1, on = a mat", "steps=2", *options])
        return tmp_path / "a.mp4"

    return command


def test_sample_writes_what_the_adapter_was_trained_for(sample, capsys):
    video = sample()
    assert capsys.readouterr().out.strip() == str(video)
    info = probe(video)
    assert (info.width, info.height, info.fps) == (48, 64, 16)
    frames = read_clip(video, start=0, frames=17, fps=16, height=64, width=48)
    assert frames.std() > 1


def test_sample_takes_another_length_and_the_same_seed(sample):
    """Equal seeds give equal videos, as near as x264 encodes equal frames alike."""
    size = {"start": 0, "frames": 9, "fps": 16, "height": 64, "width": 48}

    def video(*options: str) -> np.ndarray:
        return read_clip(sample("frames=9", *options), **size).astype(float)

    first = video()
    assert probe(sample("frames=9")).duration == pytest.approx(9 / 16, abs=0.01)
    same, other = (np.abs(x - first).mean() for x in (video(), video("seed=1")))
    assert same < 2 and other > 5 * same


def test_dense_sampling_differs(sample):
    size = {"start": 0, "frames": 17, "fps": 16, "height": 64, "width": 48}
    sparse, dense = (read_clip(sample(*o), **size).astype(float) for o in ([], ["dense=true"]))
    assert np.abs(sparse - dense).mean() > 2


@pytest.mark.long
def test_two_processes_sample_one_video(sample, run, tmp_path):
    """The first of them writes it, as near to one process's as one that samples
    twice is to itself, for x264 does not encode equal frames alike."""
    size = {"start": 0, "frames": 9, "fps": 16, "height": 64, "width": 48}
    settings = ["frames=9", "steps=2", "seed=1", "prompt=a cat: #1, on = a mat"]
    both = tmp_path / "both.mp4"
    options = [f"lora={run}", f"cache={tmp_path}", f"out={both}", *settings]
    ended = processes.finish(
        processes.start(2, "-m", "longreel.launch.commands", "sample", *options)
    )
    assert [code for code, _ in ended] == [0, 0], ended
    assert [str(both) in said for _, said in ended] == [True, False]
    together = read_clip(both, **size).astype(float)
    alone, other = (read_clip(sample("frames=9", s), **size) for s in ("seed=1", "seed=0"))
    same, different = (np.abs(together - video).mean() for video in (alone, other))
    assert same < 2 and different > 5 * same


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (None, "^--num_processes=3 must divide the model's 4 heads; what does: 1, 2, 4.$"),
        ("cuda:1", "^device=cuda:1 is one device, but each of 3 processes has its own"),
    ],
)
def test_processes_that_cannot_sample_together(device, message, monkeypatch):
    monkeypatch.setattr(
        accelerate, "PartialState", lambda **given: SimpleNamespace(num_processes=3)
    )
    with pytest.raises(ConfigError, match=message):
        join_all(4, device)


def test_export_writes_a_file_for_comfyui(run, tmp_path, capsys):
    file = tmp_path / "new" / "waves.safetensors"
    main(["export", f"lora={run}", f"cache={tmp_path}", f"out={file}", "dtype=bfloat16"])
    assert capsys.readouterr().out.strip() == str(file)
    tensors = load_file(file)
    assert len(tensors) == 3 * 4 * 2  # layers, projections, A and B
    assert tensors["diffusion_model.blocks.0.self_attn.q.lora_A.weight"].dtype == torch.bfloat16
    assert list(file.parent.iterdir()) == [file]


def test_draw_is_a_command(tmp_path, capsys):
    given = ["recipe=tiny_wan", f"cache.dir={tmp_path}", f"out={tmp_path / 'mask.png'}"]
    main(["draw", *given])
    assert (tmp_path / "mask.png").stat().st_size > 10_000
    assert "sparse layers until every video token" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: out=a.gif must end in .png."):
        main(["draw", *given[:2], "out=a.gif"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora=/no/such/run"], "/no/such/run holds no adapter"),
        (["lora="], "lora=... is missing."),
        (["out=a.ckpt"], "out=a.ckpt must end in .safetensors."),
        (["dtype=float16"], "dtype=float16 must be one of float32, bfloat16."),
        (["model=/no/such/model"], "model.path=/no/such/model cannot be loaded"),
        (["ouput=x"], "ouput is not a setting. Did you mean out?"),
    ],
)
def test_refusals_of_export(run, tmp_path, options, message):
    key = options[0].partition("=")[0]
    given = [f"lora={run}", f"out={tmp_path / 'a.safetensors'}", f"cache={tmp_path / 'tiny'}"]
    with pytest.raises(SystemExit, match="^error: ") as error:
        main(["export", *(g for g in given if not g.startswith(key + "=")), *options])
    assert message in str(error.value)
    assert list(tmp_path.glob("*.*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["frames=18"], "frames=18: wan takes 4k + 1 frames; the nearest are 17 and 21."),
        (["frames=0"], "frames=0 must be positive."),
        (["fps=-4"], "fps=-4 must be positive."),
        (["steps=0"], "steps=0 must be positive."),
        (["seed=4294967296"], "seed=4294967296 must be at least 0 and below 2^32."),
        (["height=50"], "height=50 must be a multiple of 16; the nearest are 48 and 64."),
        (["device=gpu"], "device=gpu cannot be used"),
        (["out=a.avi"], "out=a.avi must end in .mp4."),
        (["lora=/no/such/run"], "/no/such/run holds no adapter"),
        (["model=/no/such/model"], "model.path=/no/such/model cannot be loaded"),
        (["promt=x"], "promt is not a setting. Did you mean prompt?"),
        (["prompt="], "prompt=... is missing."),
    ],
)
def test_refusals(run, tmp_path, options, message):
    key = options[0].partition("=")[0]
    given = [f"lora={run}", "prompt=x", f"out={tmp_path / 'a.mp4'}", f"cache={tmp_path}"]
    with pytest.raises(SystemExit, match="^error: ") as error:
        main(["sample", *(g for g in given if not g.startswith(key + "=")), *options])
    assert message in str(error.value)


def test_an_adapter_that_does_not_fit_is_refused_before_anything_loads(run, tmp_path, monkeypatch):
    shallow = tiny.load_transformer(WAN)
    del shallow.blocks[-1]
    shallow.register_to_config(num_layers=2)
    tiny.load_pipeline(WAN, shallow).save_pretrained(tmp_path / "shallow")

    def loads(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(pipeline, "encode_captions", loads)
    monkeypatch.setattr(pipeline, "load_pipeline", loads)
    with pytest.raises(SystemExit, match=r"does not fit this model"):
        main(["sample", f"lora={run}", "prompt=x", f"model={tmp_path / 'shallow'}"])


def test_mistakes_are_told_without_loading_models():
    """`train.py` prints one line, and neither diffusers nor transformers is imported for it."""
    script = (
        "import sys; from longreel.launch.commands import main\n"
        "try: main(['train', 'recipe=tiny_wan', 'lora.rnk=3'])\n"
        "finally: print(*(m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "error: lora.rnk is not a setting. Did you mean lora.rank?"
    assert done.stdout.strip() == ""
