"""Compile the kernels for a GPU that is not there and print what the assembler says, as JSON.

Run as a script by test_compile.py, in a process of its own: the interpreter that the other tests
use is chosen once, when triton is imported.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from longreel.kernels.block_sparse import backward, forward
from longreel.kernels.block_sparse.tuning import Tile, tiles_for

BLOCK = 128
KERNELS = {
    "forward": forward._forward_kernel,
    "grad_kv": backward._grad_kv_kernel,
    "grad_q": backward._grad_q_kernel,
}
TYPES = {"Lse": "*fp32", "Lse2": "*fp32", "Delta": "*fp32", "scale": "fp32", "scale_log2": "fp32"}


def compile_kernel(kernel, tile: Tile, arch: int, head_dim: int, dtype: str) -> dict:
    """Shared memory and spills in bytes, and whether the assembler serialized matrix products."""
    constants = {
        "BLOCK": BLOCK,
        "BM": tile.q,
        "BN": tile.kv,
        "D": head_dim,
        "RAGGED": True,
        "TMA": tile.tma,
        "SPECIALIZE": tile.specialize,
        "STAGES": tile.stages,
    }
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
            continue
        if name in ("indptr", "indices", "head_to_layout", "valid"):
            signature[name] = "*i32"
        elif name[0].isupper() and len(name) > 1 or name in "QKV":
            signature[name] = TYPES.get(name, f"*{dtype}")
        else:
            signature[name] = TYPES.get(name, "i32")
        # As at a launch: pointers and strides are multiples of 16, but S and H need not be.
        if signature[name][0] == "*" or re.fullmatch("[a-z]+_[bsh]|padded", name):
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"-arch={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "shared": compiled.metadata.shared,
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)),
        "serialized": "erialized" in log,
        "specialized": "warp_specialize" in compiled.asm["ttgir"],
        "wanted_specialized": tile.specialize,
    }


def main(arch: int, head_dim: int, dtype: str, aligned: bool) -> None:
    tiles = tiles_for(
        (arch // 10, arch % 10), head_dim, 4 if dtype == "fp32" else 2, BLOCK, aligned
    )
    report = {
        name: compile_kernel(kernel, getattr(tiles, name), arch, head_dim, dtype)
        for name, kernel in KERNELS.items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "aligned")
