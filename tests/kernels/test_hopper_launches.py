"""The launchers of the Hopper kernels on a CPU, with kernels replaced by recorders: each argument
must be in its place, as test_compile.py compiles it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_kernels import (
    BY_COLUMN,
    FOR_HOPPER,
    HOPPER_WARPS,
    constants_for_hopper,
    described,
    types_for_hopper,
)
from testing import Case
from torch import Tensor

from longreel.kernels.block_sparse import hopper_backward, hopper_forward, hopper_fused
from longreel.kernels.block_sparse.lists import Lists
from longreel.kernels.block_sparse.tuning import HOPPER

BLOCK, SCALE, LOG2_E = 128, 0.25, 1.4426950408889634


class Written:
    """Replaces a kernel and records the arguments of its last launch by name."""

    def __init__(self, kernel: Any) -> None:
        self.names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*arguments: Any, num_warps: int, **named: Any) -> None:
            self.grid, self.warps = grid, num_warps
            self.given = dict(zip(self.names, arguments, strict=False)) | named
            assert len(arguments) + len(named) == len(self.names) == len(self.given)

        return launch


@pytest.fixture
def kernels(monkeypatch):
    written = {name: Written(kernel) for name, kernel in FOR_HOPPER.items()}
    written["round"] = Written(hopper_fused._round_kernel)
    monkeypatch.setattr(hopper_forward, "_forward_kernel", written["forward"])
    monkeypatch.setattr(hopper_fused, "_gradients_kernel", written["fused"])
    monkeypatch.setattr(hopper_fused, "_round_kernel", written["round"])
    monkeypatch.setattr(hopper_backward, "_grad_kv_kernel", written["grad_kv"])
    monkeypatch.setattr(hopper_backward, "_grad_q_kernel", written["grad_q"])
    return written


@pytest.mark.parametrize("tokens, valid", [(256, None), (300, None), (256, (200, 256))])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_get_what_is_compiled(head_dim, tokens, valid, kernels, monkeypatch):
    case = Case(torch.bfloat16, tokens, head_dim, BLOCK, valid, layouts=(0, 1, 0))
    (q, k, v), (grad_out, _), made, length = case.make()
    grad_out = grad_out.bfloat16()
    lists = Lists(*made.tensors, length, BLOCK)
    rows = -(-tokens // BLOCK)
    lse_sums, deltas = (torch.zeros(2, 3, rows * BLOCK) for _ in range(2))
    for module in (hopper_backward, hopper_fused):
        monkeypatch.setattr(module, "row_sums", lambda *_: (lse_sums, deltas))

    out, lse = hopper_forward.forward(q, k, v, lists, SCALE)
    saved = (grad_out, None, q, k, v, out, lse, lists, SCALE)
    one_pass, two_passes = hopper_fused.backward(*saved), hopper_backward.backward(*saved)

    common = {"queries": q, "keys": k, "values": v, "grads": grad_out, "K": k, "V": v}
    common |= {"outputs": out, "lses": lse_sums, "deltas": deltas, "Delta": deltas}
    common |= {"head_to_layout": lists.head_to_layout, "valid": length}
    common |= {"S": tokens, "H": 3, "num_rows": rows, "num_columns": rows, "padded": rows * BLOCK}
    common |= {"depth": rows.bit_length(), "scale": SCALE, "scale_log2": SCALE * LOG2_E}
    common |= dict(zip(("k_b", "k_s", "k_h"), k.stride(), strict=False))
    common |= dict(zip(("v_b", "v_s", "v_h"), v.stride(), strict=False))
    for name in FOR_HOPPER:
        kernel, pipeline = kernels[name], getattr(HOPPER[head_dim], name)
        assert kernel.grid == (rows, 6) and kernel.warps == HOPPER_WARPS
        tile = BLOCK if name == "fused" else pipeline.tile
        of_rows = lists.row_indptr, lists.row_indices
        of_columns = lists.col_indptr, lists.col_indices
        indptr, indices = of_columns if name in BY_COLUMN else of_rows
        grads = one_pass if name == "fused" else two_passes
        expected = common | constants_for_hopper(name, pipeline, head_dim)
        expected |= {"RAGGED": valid is not None or tokens % tile != 0}
        expected |= {"indptr": indptr, "indices": indices}
        expected |= {"Lse": lse if name == "forward" else lse_sums}
        expected |= dict(zip(("grad_queries", "grad_keys", "grad_values"), grads, strict=True))
        types = types_for_hopper(name, pipeline, head_dim, "bf16")
        for argument, value in kernel.given.items():
            of = getattr(value, "base", value)  # of a descriptor
            if of is not value:
                short = "bf16" if of.dtype == torch.bfloat16 else "fp32"
                assert described(value, short) == types[argument], f"{name}: {argument}"
            if argument == "sum_queries":  # the launcher's own
                assert not of.any()
                assert kernels["round"].given["Sums"].data_ptr() == of.data_ptr()
            elif isinstance(of, Tensor):
                assert of.data_ptr() == expected[argument].data_ptr(), f"{name}: {argument}"
            else:
                assert value == expected[argument], f"{name}: {argument}"
    assert kernels["round"].given["GradQ"] is one_pass[0]
