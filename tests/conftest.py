"""Choose Triton's interpreter where there is no GPU, before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole runs first: begun last, they would keep one worker busy and the others idle."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def interpreted(monkeypatch):
    """Run Triton kernels in the interpreter, with bf16 as a GPU has it.

    Triton's own (3.6 to 3.9) multiplies the bit patterns of bf16 as if they were integers, and cuts
    fp32 off where a GPU rounds it.
    """
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: test_gpu.py checks them")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype("uint32") << 16
        return TensorHandle(bits.view("float32"), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )
    truncate = InterpreterBuilder.create_fp_trunc

    def rounded(self, value: TensorHandle, dtype) -> TensorHandle:
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, value, dtype)
        exact = torch.from_numpy(value.data.astype("float32"))
        bits = exact.bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
