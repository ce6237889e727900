"""Methods that save memory on a GPU: bit-equal at full width, less at the peak, no waiting host.

Runs ask for deterministic algorithms and take no others, so equal means equal to the bit: asked
with a warning only, torch's own attention goes on adding up in varying order.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_width import CASES, Case, guidance, inputs, load, save_blocks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense, Radial, SparsePattern
from longreel.trainer import flow
from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Memory, Sigma
from longreel.trainer.memory.checkpointing import block_checkpoint
from longreel.trainer.memory.keep_attention import ATTENTION_OPS
from longreel.trainer.memory.offload import Offload, StoredBlock, StreamCopies

pytestmark = [pytest.mark.gpu, pytest.mark.large]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not be taken
LAYERS = 6
BLOCKS = {
    "wan": {"num_layers": LAYERS},
    "hunyuan": {"num_layers": 2, "num_single_layers": LAYERS - 2},
    "mochi": {"num_layers": LAYERS},
}
FULL, CHUNK = Memory(recompute="all"), 4096
Size = tuple[int, int, int]  # of latents: frames, height, width
METHODS = {
    "attention": Memory(recompute="all_but_attention"),
    "offload": Memory(offload=True),
    "offload all": Memory(offload=True, offload_keep=0),
    "attention, offload": Memory(recompute="all_but_attention", offload=True),
}


def quarter(case: Case) -> Size:
    """A quarter of each frame of the target length: attention takes a sixteenth of the time."""
    frames, height, width = case.latents
    return frames, height // 4 * 2, width // 4 * 2


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return replace(CASES[request.param], blocks=BLOCKS[request.param])


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(case.family.name)
    save_blocks(case, folder)
    return folder


@dataclass
class Run:
    """Holds the second of two steps. peak: bytes. size: of a block's input, in bytes."""

    grads: dict[str, Tensor]
    peak: int
    seconds: float
    size: int
    attention_calls: int


class CountAttention(TorchDispatchMode):
    """Calls of attention's forward by the shape of their keys, in autograd's threads too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[torch.Size] = Counter()

    def of(self, tokens: int) -> int:
        """Those of self-attention over so many tokens."""
        return sum(count for shape, count in self.calls.items() if tokens in shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ATTENTION_OPS:
            self.calls[args[1].shape] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    case: Case,
    folder: Path,
    memory: Memory,
    size: Size,
    *,
    first: Size | None = None,
    pattern: SparsePattern | None = None,
    page: int | None = None,
    exact: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    dropout: float = 0.1,
) -> Run:
    """Two steps on clips of a size, or one after a step on a clip of the `first`."""
    attention = SparseAttention(pattern or Radial())
    model = load(case, folder, dtype)
    parameters = dict(lora.attach(model, case.family, rank=128, dropout=dropout))
    for name, parameter in parameters.items():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(1))
    case.family.install(model, attention)
    if memory.mlp_chunk:
        case.family.blocks.chunk_mlp(model, memory.mlp_chunk)
    blocks = block_checkpoint(memory, attention, torch.device("cuda"))
    assert blocks is not None
    if memory.offload and page is not None:
        blocks.offload = Offload(torch.device("cuda"), keep=memory.offload_keep, page=page)
    model.enable_gradient_checkpointing(blocks)
    clips = {shape: inputs(case, model, shape, (100,)) for shape in {first or size, size}}

    def step(shape: Size) -> None:
        clean, text = clips[shape]
        torch.manual_seed(0)
        noise, sigma = flow.sample(clean, Sigma(), torch.Generator().manual_seed(0))
        flow.flow_matching_loss(
            case.family, model, clean, text, sigma, noise, guidance(case)
        ).backward()
        torch.cuda.synchronize()

    with deterministic(exact):
        step(first or size)
        for parameter in parameters.values():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with CountAttention() as count:
            step(size)
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    assert attention.current is not None
    tokens = len(attention.current.grid)
    grads = {n: p.grad.cpu() for n, p in parameters.items() if p.grad is not None}
    assert grads.keys() == parameters.keys() and all(g.isfinite().all() for g in grads.values())
    config = model.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return Run(grads, peak, seconds, 2 * tokens * width, count.of(tokens))


def assert_equal(got: Run, expected: Run) -> None:
    assert got.grads.keys() == expected.grads.keys()
    different = [n for n, g in expected.grads.items() if not torch.equal(got.grads[n], g)]
    assert not different and any(g.any() for g in got.grads.values())


@pytest.fixture(scope="module")
def full(case: Case, folder: Path) -> Run:
    """Plain checkpointing, the same twice."""
    first = run(case, folder, FULL, quarter(case))
    assert_equal(run(case, folder, FULL, quarter(case)), first)
    assert first.attention_calls == 2 * LAYERS
    return first


@pytest.fixture
def never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any synchronisation of the host within the offload is an error."""

    def strict(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    for name in ("keep", "send", "release", "fetch", "_get"):
        monkeypatch.setattr(StoredBlock, name, strict(getattr(StoredBlock, name)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("never_waits")
def test_bit_equal_and_less_at_the_peak(case: Case, folder: Path, full: Run, name: str):
    check(run(case, folder, METHODS[name], quarter(case)), full, name)


@pytest.mark.usefixtures("never_waits")
def test_bit_equal_at_the_target_length(case: Case, folder: Path):
    """All methods at once; what was pinned for a small clip has to grow."""
    expected = run(case, folder, FULL, case.latents, first=case.small)
    name = "attention, offload"
    check(run(case, folder, METHODS[name], case.latents, first=case.small), expected, name)


def check(got: Run, full: Run, name: str) -> None:
    """Bit-equal, with as many computations of attention and as large a peak as the method says."""
    memory = METHODS[name]
    print(
        f"{name}: peak {got.peak / 2**30:.1f} GiB, {got.seconds:.2f} s; full checkpointing: "
        f"{full.peak / 2**30:.1f} GiB, {full.seconds:.2f} s; a block's input "
        f"{got.size / 2**30:.2f} GiB"
    )
    assert_equal(got, full)
    keeps = memory.recompute == "all_but_attention"
    assert got.attention_calls == (1 if keeps else 2) * LAYERS
    if memory.offload:  # at most: the kept one, one that leaves, one that comes
        on_device = min(memory.offload_keep, 1) + 2
        assert got.peak <= full.peak - (LAYERS - on_device - 1) * got.size + (
            on_device * got.size * 1.1 if keeps else 0
        )
    else:
        assert full.peak < got.peak <= full.peak + LAYERS * 1.1 * got.size


def test_chunked_mlps_take_less_at_the_peak(case: Case, folder: Path, full: Run):
    got = run(case, folder, Memory(mlp_chunk=CHUNK), quarter(case))
    print(f"mlp_chunk: peak {got.peak / 2**30:.1f}, full {full.peak / 2**30:.1f} GiB")
    assert got.peak <= full.peak - got.size


def test_chunked_mlps_are_as_near_to_fp32(case: Case, folder: Path):
    """Sums over a chunk's tokens are rounded one by one: gradients at most twice as far from those
    of an fp32 model as whole MLPs leave them."""
    exact, whole, chunked = (
        run(case, folder, memory, case.small, dtype=dtype, dropout=0.0, exact=False)
        for memory, dtype in (
            (FULL, torch.float32),
            (FULL, torch.bfloat16),
            (Memory(mlp_chunk=700), torch.bfloat16),
        )
    )
    for name, oracle in exact.grads.items():
        error, allowed = ((x.grads[name] - oracle).norm().item() for x in (chunked, whole))
        assert error <= 2 * allowed, f"{name}: {error:.3e} against {allowed:.3e}"


@pytest.mark.parametrize("name", [name for name in METHODS if "offload" in name])
def test_copies_may_come_late(case: Case, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """Each is held up by some ten milliseconds: nothing reads, overwrites or frees before it."""
    copy, held_up = StreamCopies._copy, []

    def late(self: StreamCopies, stream: torch.cuda.Stream, pairs: Any) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
        held_up.append(1)
        return copy(self, stream, pairs)

    expected = run(case, folder, FULL, case.small)
    monkeypatch.setattr(StreamCopies, "_copy", late)
    assert_equal(run(case, folder, METHODS[name], case.small, page=2**18), expected)
    assert len(held_up) >= 2 * 2 * (LAYERS - 2)


def distance(got: Run, expected: Run) -> float:
    """Return the relative distance of all gradients together."""
    pairs = [(got.grads[name].double(), g.double()) for name, g in expected.grads.items()]
    of = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return float(of) ** 0.5


def run_dense(
    case: Case,
    folder: Path,
    memory: Memory,
    backend: SDPBackend = SDPBackend.FLASH_ATTENTION,
    *,
    exact: bool = True,
) -> Run:
    with sdpa_kernel([backend, SDPBackend.MATH]):
        got = run(case, folder, memory, case.small, pattern=Dense(), page=2**18, exact=exact)
    assert got.attention_calls == (2 if memory is FULL else 1) * LAYERS
    return got


@pytest.fixture(scope="module")
def flash(case: Case, folder: Path) -> Run:
    """Plain checkpointing under dense attention, on a small grid."""
    return run_dense(case, folder, FULL)


KEEPING = [name for name in METHODS if "attention" in name]


@pytest.mark.parametrize("name", KEEPING)
def test_dense_layers_keep_what_sdpa_returned(case: Case, folder: Path, flash: Run, name: str):
    assert_equal(run_dense(case, folder, METHODS[name]), flash)


@pytest.mark.parametrize(
    "backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=lambda x: x.name
)
@pytest.mark.parametrize("name", KEEPING)
def test_dense_layers_keep_what_inexact_sdpa_returned(
    case: Case, folder: Path, flash: Run, backend: SDPBackend, name: str
):
    """No backward of these is deterministic: they are nearer to a plain run than that is to
    flash."""
    plain = run_dense(case, folder, FULL, backend, exact=False)
    got = run_dense(case, folder, METHODS[name], backend, exact=False)
    budget, difference = distance(plain, flash), distance(got, plain)
    print(f"{name}, {backend.name}: {difference:.1e}, to flash attention {budget:.1e}")
    assert 0 < budget < 0.05 and difference < budget
