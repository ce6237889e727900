"""Compile the kernels of modulated_norm for a GPU that need not be present; print JSON."""

import json
import sys

from compile_kernels import compile_kernel
from triton.compiler import ASTSource

from longreel.kernels.modulated_norm import kernel

WIDTHS = {"wan 1.3b": 1536, "mochi": 3072, "wan 14b": 5120}
KERNELS = {
    "norm": kernel._norm_kernel,
    "norm_backward": kernel._norm_backward_kernel,
    "gate": kernel._gate_kernel,
}


def main(arch: int) -> None:
    report = {}
    for family, width in WIDTHS.items():
        block = 1 << (width - 1).bit_length()
        for name, function in KERNELS.items():
            constants = {"BLOCK": block, "LAYER": family != "mochi"}
            constants = {k: v for k, v in constants.items() if k in function.arg_names}
            tensors = dict.fromkeys(("X", "Y", "Out", "GradOut", "GradX"), "*bf16")
            modulations = dict.fromkeys(("Scale", "Shift", "Gate"), "*fp32")
            report[f"{family}, {name}"] = compile_kernel(
                ASTSource,
                function,
                tensors | modulations | {"eps": "fp32"},
                constants,
                arch,
                num_warps=kernel.warps_for(block),
                enable_fp_fusion=False,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
