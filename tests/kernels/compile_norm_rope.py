"""Compile the kernels of norm_rope for a GPU that is not there: each family's, as JSON."""

import json
import sys

from compile_kernels import compile_kernel
from triton.compiler import ASTSource

from longreel.kernels.norm_rope import kernel

# Heads side by side in a norm, whether it rounds before its weight, and the strides of its tables.
FAMILIES = {
    "hunyuan": (0, True, 2),
    "hunyuan, text": (0, True, None),
    "mochi": (0, False, 1),
    "wan 1.3b": (12, False, 2),
    "wan 14b": (40, False, 2),
}
KERNELS = {"forward": kernel._forward_kernel, "backward": kernel._backward_kernel}


def main(arch: int) -> None:
    report = {}
    for family, (heads, round_first, by_pair) in FAMILIES.items():
        across = heads > 0
        for name, function in KERNELS.items():
            for dtype in ("bf16", "fp32"):
                rows = 1 << (heads - 1).bit_length() if across else kernel.ROWS
                constants = {
                    "ROWS": rows,
                    "D": 128,
                    "ACROSS": across,
                    "ROUND_FIRST": round_first,
                }
                if by_pair is None:
                    constants |= {"Cos": None, "Sin": None}
                elif by_pair == 1:
                    constants |= {"t_d": 1}
                tensors = ("X", "Weight", "Out", "GradOut", "GradX")
                types = dict.fromkeys(tensors, f"*{dtype}")
                types |= {"Cos": "*fp32", "Sin": "*fp32", "eps": "fp32"}
                report[f"{family}, {name}, {dtype}"] = compile_kernel(
                    ASTSource,
                    function,
                    types,
                    constants,
                    arch,
                    num_warps=rows // kernel.ROWS_OF_WARP,
                    enable_fp_fusion=False,
                )
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
