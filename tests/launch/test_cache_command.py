"""`longreel cache verify | gc | show`."""

import os
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from stub_cache import SPEC, add, build
from videos import noise, write_waves

from longreel.data.decode import probe, read_clip
from longreel.launch.commands import main
from longreel.trainer.clips import prepare_data
from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job


@pytest.fixture
def cache(tmp_path) -> Path:
    for index in range(3):
        add(tmp_path / "v", f"{index}.mp4", 10 + index, f"caption {index}")
    build(tmp_path / "v", SPEC, tmp_path / "cache")
    return tmp_path / "cache"


def run(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()  # what was logged before, where a run of another test opened a console
    main(["cache", *arguments])
    return capsys.readouterr().out.splitlines()


def test_verify(cache, tmp_path, capsys):
    assert run(capsys, "verify", f"dir={cache}") == ["6 files, 0.00 GB: 0 damaged"]
    torn, changed, other = sorted((cache / "latents").rglob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-3])
    content = bytearray(changed.read_bytes())
    content[-100] ^= 1  # one bit, as a disk loses it
    changed.write_bytes(content)
    caption = min((cache / "text").rglob("*.safetensors"))
    content = bytearray(caption.read_bytes())
    content[-3] ^= 1
    caption.write_bytes(content)
    with pytest.raises(SystemExit, match="^error: the cache has damaged files.*delete=true"):
        run(capsys, "verify", f"dir={cache}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{torn}: cannot be read (")
    assert lines[1] == f"{changed}: its tensors differ from what was written"
    assert lines[2] == f"{caption}: its tensors differ from what was written"
    lines = run(capsys, "verify", f"dir={cache}", "delete=true")
    assert lines[-2] == "6 files, 0.00 GB: 3 damaged"
    assert lines[-1] == f"{tmp_path / 'v'}: 3 files are missing, and are encoded at its next run"
    assert build(tmp_path / "v", SPEC, cache).report.encoded == 2
    assert run(capsys, "verify", f"dir={cache}") == ["6 files, 0.00 GB: 0 damaged"]


def test_gc_keeps_what_recent_runs_use(cache, tmp_path, capsys):
    (tmp_path / "v" / "2.mp4").unlink()
    (tmp_path / "v" / "1.txt").write_text("another caption")
    build(tmp_path / "v", SPEC, cache)
    left = cache / "latents" / ".x.safetensors.1.tmp"
    fresh = cache / "latents" / ".y.safetensors.2.tmp"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    lines = run(capsys, "gc", f"dir={cache}")
    assert lines[0].startswith(f"in use: {tmp_path / 'v'}, 9 x 32 x 48 at 16 fps, 2 clips")
    assert lines[-1].startswith("4 files, 0.00 GB: not in use (delete=true")
    assert left.exists() and len(list(cache.rglob("*.safetensors"))) == 7
    assert run(capsys, "gc", f"dir={cache}", "delete=true")[-1] == "4 files, 0.00 GB: deleted"
    assert not left.exists() and fresh.exists()
    assert build(tmp_path / "v", SPEC, cache).report.encoded == 0
    assert len(list(cache.rglob("*.safetensors"))) == 4
    # A run that nobody started for long loses its files.
    for path in (cache / "manifests").iterdir():
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    assert run(capsys, "gc", f"dir={cache}")[0] == "no run was started in the last 30 days"
    assert run(capsys, "gc", f"dir={cache}", "days=50")[-1].startswith("0 files")
    run(capsys, "gc", f"dir={cache}", "delete=true")
    assert not list(cache.rglob("*.safetensors"))


def test_gc_keeps_what_a_run_is_writing(cache, tmp_path, capsys):
    """Its clips are in no manifest of a finished build yet."""
    add(tmp_path / "other", "a.mp4", 12, "another")
    add(tmp_path / "other", "b.mp4", 12, "and another", frames=noise(12))

    def clean(done: int, total: int, stage: str) -> None:
        if (done, stage) == (1, "encoding clips"):
            run(capsys, "gc", f"dir={cache}", "days=0.01", "delete=true")

    prepared = build(tmp_path / "other", SPEC, cache, progress=clean)
    assert all(entry.latents.exists() and entry.text.exists() for entry in prepared.entries)
    assert build(tmp_path / "other", SPEC, cache).report.encoded == 0


def test_show_decodes_a_clip(tmp_path, capsys):
    videos = write_waves(tmp_path / "v", 2, 20, 64, 64, 16)
    cache, out = tmp_path / "cache", tmp_path / "out.mp4"
    given = ["recipe=tiny_wan", f"data.path={videos}", f"cache.dir={cache}", "extend.native=9"]
    job = Job.from_config(load([*given, "height=64", "width=64"]))
    prepare_data(job, Accelerator(cpu=True), torch.float32)
    lines = run(capsys, "show", "1", f"dir={cache}", f"out={out}")
    assert lines == ["1.mp4@0: 17 frames of 64 x 64: waves number 1", str(out)]
    assert probe(out).fps == 16
    shown = read_clip(out, start=0, frames=17, fps=16, height=64, width=64)
    assert shown.std() > 1
    with pytest.raises(SystemExit, match="clip 2: .* has the clips 0 to 1"):
        run(capsys, "show", "2", f"dir={cache}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cache '' is not a command"),
        (["list"], "cache 'list' is not a command"),
        (["verify", "dir=/no/such"], "dir=/no/such is not a cache"),
        (["gc", "day=3"], "day is not a setting. Did you mean days?"),
        (["gc", "days=nan", "delete=true"], "days=nan is not a finite number"),
        (["show", "x"], "clip=x must be a whole number"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(SystemExit) as error:
        main(["cache", *arguments])
    assert message in str(error.value)
