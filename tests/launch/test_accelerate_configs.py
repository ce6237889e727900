"""The accelerate configurations in launch/."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))

# What a script sees of the processes that accelerate started.
SCRIPT = """
from accelerate import PartialState
state = PartialState()
print(f"process {state.process_index} of {state.num_processes} on {state.device.type}")
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the recipe's memory.base_dtype is the only precision
    assert (config.num_processes > 1) == (config.distributed_type != "NO")
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"accelerate launch --config_file launch/{path.name} train.py recipe=" in header


def launch(tmp_path, *options):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return sorted(line for line in run.stdout.splitlines() if line.startswith("process"))


def test_cpu_starts_one_process(tmp_path):
    lines = launch(tmp_path, "--config_file", "launch/cpu.yaml")
    assert lines == ["process 0 of 1 on cpu"]


@pytest.mark.gpu
def test_one_gpu_starts_one_process(tmp_path):
    lines = launch(tmp_path, "--config_file", "launch/one_gpu.yaml")
    assert lines == ["process 0 of 1 on cuda"]
