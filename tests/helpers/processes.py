"""Scripts in processes of their own: one, or several without a launcher that would end them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(
    processes: int,
    *arguments: str,
    folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """A Python script with its arguments over gloo, one process a rank.

    folder: where `rank-N.log` holds what each said; None: pipes. settings: of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        path = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
        usual = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        output = subprocess.PIPE if folder is None else (folder / f"rank-{rank}.log").open("w")
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | usual | (settings or {}) | place,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and output of each; all are gone afterwards."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text or "") for process, text in zip(started, said, strict=True)]


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python code with its arguments in a new interpreter, to its end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
