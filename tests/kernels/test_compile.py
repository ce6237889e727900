"""Every tile of the table compiles for its GPU, fits its shared memory and does not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# dK and dV at head_dim 128 fill every register; with these few bytes spilled the kernel is still
# the fastest of those measured. Elsewhere one or two registers are forgiven.
SPILLS = {(90, 128, "grad_kv"): 128}
FORGIVEN = 8
# Heads of 16 channels are the tiny models' alone: their dK/dV by pointers may be slow.
SERIALIZED = {(90, 16, "grad_kv")}
SLOW = pytest.mark.slow


def compile_for(arch: int, head_dim: int, dtype: str, aligned: bool) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    arguments = [str(arch), str(head_dim), dtype, "aligned" if aligned else "unaligned"]
    run = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "arch, head_dim, dtype, aligned",
    [
        (90, 128, "bf16", True),
        (80, 128, "bf16", True),
        pytest.param(90, 64, "bf16", True, marks=SLOW),
        pytest.param(90, 32, "fp16", True, marks=SLOW),
        pytest.param(90, 16, "bf16", True, marks=SLOW),
        pytest.param(90, 128, "bf16", False, marks=SLOW),
        pytest.param(90, 64, "bf16", False, marks=SLOW),
        pytest.param(80, 64, "bf16", True, marks=SLOW),
        pytest.param(80, 32, "fp16", True, marks=SLOW),
        pytest.param(89, 128, "bf16", True, marks=SLOW),
        pytest.param(89, 64, "bf16", True, marks=SLOW),
        pytest.param(89, 64, "fp32", True, marks=SLOW),
        pytest.param(89, 128, "fp32", True, marks=SLOW),
        pytest.param(100, 128, "bf16", True, marks=SLOW),
        pytest.param(100, 64, "bf16", True, marks=SLOW),
        pytest.param(120, 128, "bf16", True, marks=SLOW),
    ],
)
def test_compiles(arch, head_dim, dtype, aligned):
    for name, got in compile_for(arch, head_dim, dtype, aligned).items():
        assert got["shared"] <= SHARED_KIB[arch] * 1024, name
        if (arch, head_dim, name) not in SERIALIZED:
            assert not got["serialized"], f"{name}: the assembler serialized its matrix products"
        assert got["specialized"] == got["wanted_specialized"], name
        if dtype != "fp32":
            assert got["spilled"] <= SPILLS.get((arch, head_dim, name), FORGIVEN), name
