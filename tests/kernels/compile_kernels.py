"""Compile the kernels for a GPU that need not be present; print the assembler's report as JSON.

Run as a script by test_compile.py, in a process of its own: the interpreter that the other tests
use is chosen once, when triton is imported.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from longreel.kernels.block_sparse import (
    backward,
    forward,
    hopper_backward,
    hopper_forward,
    hopper_fused,
)
from longreel.kernels.block_sparse.hopper import ROWS, sums_of, tiles_of
from longreel.kernels.block_sparse.tuning import HOPPER, Pipeline, Tile, tiles_for

BLOCK = 128
PORTABLE = {
    "forward": forward._forward_kernel,
    "grad_kv": backward._grad_kv_kernel,
    "grad_q": backward._grad_q_kernel,
}
FOR_HOPPER = {
    "forward": hopper_forward._forward_kernel,
    "fused": hopper_fused._gradients_kernel,
    "grad_kv": hopper_backward._grad_kv_kernel,
    "grad_q": hopper_backward._grad_q_kernel,
}
BY_COLUMN = "fused", "grad_kv"  # of keys; the others walk rows, of queries
HOPPER_WARPS = 4
TYPES = {"scale": "fp32", "scale_log2": "fp32"}
TYPES |= dict.fromkeys(("Lse", "Lse2", "Delta"), "*fp32")
TYPES |= dict.fromkeys(("indptr", "indices", "head_to_layout", "valid"), "*i32")


def compile_kernel(source, kernel, types: dict, constants: dict, arch: int, **options) -> dict:
    """Shared memory and spills in bytes, whether the assembler serialized matrix products, and how
    many barriers share an address with another or are never invalidated."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        # As at a launch: pointers and strides are multiples of 16, but S and H need not be.
        if signature[name][0] == "*" or re.fullmatch("[a-z]+_[bsh]|padded", name):
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        source(kernel, signature, values, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"-arch={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    alive, made, aliased = set(), 0, 0
    for begins, address in re.findall(r"mbarrier\.(init|inval)\S* \[([^]]+)\]", ptx):
        if begins == "init":
            made, aliased = made + 1, aliased + (address in alive)
            alive.add(address)
        else:  # its memory may serve the next one
            alive.discard(address)
    return {
        "shared": compiled.metadata.shared,
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)),
        "serialized": "erialized" in log,
        "aliased": aliased,
        "left": made - ptx.count("mbarrier.inval"),
    }


def compile_portable(kernel, tile: Tile, arch: int, head_dim: int, dtype: str) -> dict:
    constants = {
        "BLOCK": BLOCK,
        "BM": tile.q,
        "BN": tile.kv,
        "D": head_dim,
        "RAGGED": True,
        "STAGES": tile.stages,
    }
    tensors = [name for name in kernel.arg_names if name[0].isupper() and len(name) > 1]
    types = dict.fromkeys([*tensors, "Q", "K", "V"], f"*{dtype}") | TYPES
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compile_kernel(ASTSource, kernel, types, constants, arch, **options)


def described(descriptor, of: str) -> str:
    return f"tensordesc<{of}{descriptor.block_shape},{descriptor.layout!r}>"


def types_for_hopper(name: str, pipeline: Pipeline, head_dim: int, dtype: str) -> dict[str, str]:
    """Return the types of the arguments that are not numbers."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tokens = torch.empty(1, 256, 1, head_dim, dtype=torch_dtype)
    sums = torch.empty(16, 256)

    own = described(tiles_of(tokens, ROWS.value), dtype)
    circulating = described(tiles_of(tokens, pipeline.tile), dtype)
    by_column = name in BY_COLUMN
    return {
        **dict.fromkeys(("queries", "grads"), circulating if by_column else own),
        **dict.fromkeys(("keys", "values"), own if by_column else circulating),
        **dict.fromkeys(("outputs", "grad_queries", "grad_keys", "grad_values"), own),
        **dict.fromkeys(("lses", "deltas"), described(sums_of(sums, 1, pipeline.tile), "fp32")),
        "sum_queries": described(sums_of(sums, hopper_fused.CHUNK_ROWS.value, 256), "fp32"),
        **dict.fromkeys("KV", f"*{dtype}"),
        **TYPES,
    }


def constants_for_hopper(name: str, pipeline: Pipeline, head_dim: int) -> dict[str, int]:
    return {
        "BLOCK": BLOCK,
        "BM" if name in BY_COLUMN else "BN": pipeline.tile,
        "D": head_dim,
        "SLOTS": pipeline.slots,
        "RAGGED": True,
        "REGISTERS": pipeline.registers,
        "PRODUCER_REGISTERS": pipeline.producer_registers,
    }


def compile_for_hopper(name: str, pipeline: Pipeline, head_dim: int, dtype: str) -> dict:
    types = types_for_hopper(name, pipeline, head_dim, dtype)
    constants = constants_for_hopper(name, pipeline, head_dim)
    return compile_kernel(
        GluonASTSource, FOR_HOPPER[name], types, constants, 90, num_warps=HOPPER_WARPS
    )


def main(arch: str, head_dim: int, dtype: str) -> None:
    if arch == "hopper":
        report = {
            name: compile_for_hopper(name, getattr(HOPPER[head_dim], name), head_dim, dtype)
            for name in FOR_HOPPER
        }
    else:
        capability = int(arch) // 10, int(arch) % 10
        tiles = tiles_for(capability, head_dim, 4 if dtype == "fp32" else 2, BLOCK)
        report = {
            name: compile_portable(kernel, getattr(tiles, name), int(arch), head_dim, dtype)
            for name, kernel in PORTABLE.items()
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
