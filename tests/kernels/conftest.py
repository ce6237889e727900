import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that an unwritten element shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(monkeypatch):
    """Run Triton kernels in the interpreter, with matrix products that know bf16.

    Triton's own (3.6 to 3.9) multiply the bit patterns of bf16 as if they were integers.
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
