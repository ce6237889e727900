"""Kernels of a trace by part: names as CUPTI has them on a Hopper GPU."""

import json

import pytest
import torch
from lib.parts import COPIES, IDLE, Kernel, kernels_of, profiled, summary
from torch.profiler import ProfilerActivity, profile

BF16, FP32 = "c10::BFloat16", "float"


def kernel(name, op="", inputs="", start=0.0, seconds=1.0):
    return Kernel(name, op, inputs, start, seconds)


@pytest.mark.parametrize(
    "name, op, inputs, part",
    [
        ("_forward_kernel", "longreel::block_sparse_attention", "bf16[1, 9]", "attention"),
        ("_gradients_kernel", "longreel::block_sparse_attention_backward", "", "attention"),
        ("_grad_kv_kernel", "", "", "attention"),
        ("_grad_q_kernel", "", "", "attention"),
        ("_row_sums_kernel", "", "", "attention"),
        ("_round_kernel", "", "", "attention"),
        ("_forward_kernel", "longreel::norm_rope", "bf16[1, 9]", "element-wise"),
        ("_backward_kernel", "longreel::norm_rope_backward", "bf16[1, 9]", "element-wise"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "", "", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 8>", "", "", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x128_k128_sm80", "", "", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "", "", "attention"),
        (
            "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT",
            "aten::addmm",
            "bf16[8] bf16[4, 8]",
            "matmul",
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "", "", "matmul"),
        ("sm90_xmma_fprop_implicit_gemm", "aten::cudnn_convolution", "bf16[1, 16]", "matmul"),
        ("cudnn::engines_precompiled::nhwc", "aten::cudnn_convolution", "bf16[1]", "matmul"),
        ("nvjet_qqtst_128x256_128x4", "aten::_scaled_mm", "e4m3[4, 8] e4m3[8, 4]", "matmul"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n", "", "", "fp32 matmul"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_256x128>", "aten::mm", "", "fp32 matmul"),
        ("nvjet_sss_128x128", "aten::mm", "fp32[4, 8] fp32[8, 4]", "fp32 matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "aten::mm", "fp32[4, 8]", "fp32 matmul"),
        ("void at::native::multi_tensor_apply_kernel<>", "aten::_foreach_lerp_", "", "optimizer"),
        ("kOptimizerStatic8bit2StateBlockwise<float>", "", "", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4>", "aten::mul", "", "element-wise"),
        ("void at::native::vectorized_layer_norm_kernel", "", "", "element-wise"),
        ("Memcpy DtoH (Device -> Pinned)", "aten::copy_", "", COPIES),
        ("Memcpy HtoD (Pinned -> Device)", "aten::copy_", "", COPIES),
        ("Memcpy DtoD (Device -> Device)", "aten::copy_", "", "element-wise"),
        ("Memset (Device)", "aten::zero_", "", "element-wise"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "", "", "exchange"),
    ],
)
def test_part_of_a_kernel(name, op, inputs, part):
    assert kernel(name, op, inputs).part == part


def test_kernels_know_what_launched_them():
    """A trace gives both the same id; copies and kernels without one are kept."""
    types, sizes = [BF16, FP32, "Scalar", "TensorList"], [[1, 8], [8, 4], [], [[2], [2]]]
    of_op = {"External id": 3, "Input type": types, "Input Dims": sizes}
    events = [
        {"cat": "cpu_op", "name": "aten::mm", "args": of_op},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "args": {"External id": 3}},
        {"cat": "kernel", "name": "gemm", "ts": 2e6, "dur": 5e5, "args": {"External id": 3}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 1e6, "dur": 1e6, "args": {}},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    matmul, copy = kernels_of(events)
    assert matmul == kernel("gemm", "aten::mm", "bf16[1, 8] fp32[8, 4]", 2.0, 0.5)
    assert copy == kernel("Memcpy HtoD", start=1.0)
    assert matmul.label == "gemm | mm | bf16[1, 8] fp32[8, 4]"


def test_parts_fill_a_step():
    """Two streams overlap, a copy hides the end of a gap: idle is what no kernel covers."""
    kernels = [
        kernel("add", "aten::add", "bf16[4]", 4.0, 2.0),
        kernel("_forward_kernel", start=1.0, seconds=2.0),
        kernel("add", "aten::add", "bf16[4]", 5.0, 2.0),
        kernel("Memcpy HtoD", start=0.0, seconds=9.0),
        kernel("tiny", start=6.5, seconds=1e-5),
    ]
    parts, kernels = summary(kernels, 10.0)
    assert parts["attention"] == 2 and parts["element-wise"] == pytest.approx(4, abs=1e-4)
    assert parts[COPIES] == 9 and parts[IDLE] == pytest.approx(10 - 2 - 3)
    assert kernels["add | add | bf16[4]"] == ("element-wise", 2, 4.0)
    assert not any(label.startswith("tiny") for label in kernels)


def test_a_trace_of_this_torch_has_what_is_read(tmp_path):
    """Ops by `External id`, with types and sizes; a CPU has no kernels."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watching:
        torch.ones(3, 4, dtype=torch.bfloat16) @ torch.ones(4, 2, dtype=torch.bfloat16)
    watching.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (mm,) = (e for e in events if e.get("cat") == "cpu_op" and e["name"] == "aten::mm")
    launched = {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 1.0}
    launched["args"] = {"External id": mm["args"]["External id"]}
    (found,) = kernels_of([*events, launched])
    assert (found.op, found.inputs) == ("aten::mm", "bf16[3, 4] bf16[4, 2]")


def test_a_profile_of_a_step_without_kernels():
    """On a CPU, whose profiler has none to tell of."""
    seconds, found = profiled(lambda: float(torch.ones(4).sum()))
    assert seconds == 4 and found.parts[IDLE] == 4 and not found.kernels
