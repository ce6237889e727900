"""Hold what PyTorch is told of a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from longreel.trainer.memory.device import ALLOCATOR, fastest_dense, grow_segments

TELL = """
import torch
from longreel.trainer.memory.device import grow_segments
grow_segments()
if torch.cuda.is_available():
    kept = torch.ones(2**22, device="cuda")
    print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
else:
    print([torch._C._accelerator_getAllocatorSettings()])
"""


def told(**settings: str) -> str:
    """Ask a process of its own: torch reads its environment once."""
    environment = {name: x for name, x in os.environ.items() if name not in ALLOCATOR} | settings
    run = [sys.executable, "-c", TELL]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout


def test_torch_hears_of_growing_segments():
    assert "expandable_segments:True" in told()


@pytest.mark.gpu
def test_segments_grow():
    assert told().strip() == "[True]"
    assert told(PYTORCH_ALLOC_CONF="expandable_segments:False").strip() == "[False]"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_users_decide_for_themselves(monkeypatch, name):
    for known in ALLOCATOR:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    grow_segments()
    assert {x: os.environ[x] for x in ALLOCATOR if x in os.environ} == {
        name: "max_split_size_mb:512"
    }


def test_dense_attention_has_an_order():
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with fastest_dense():
        first, *_, last = _cur_sdpa_kernel_backends(with_priority=True)
    assert (first, last) == (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.gpu
def test_dense_attention_is_that_of_cudnn():
    q = torch.randn(1, 4, 1000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with fastest_dense():
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert "Cudnn" in type(out.grad_fn).__name__
