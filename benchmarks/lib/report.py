"""Shared parts of the result files: the machine, the file's path, and its sections."""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from longreel.data.files import replacing
from longreel.trainer.config.values import ConfigError

RESULTS = Path(__file__).parents[1] / "results"


def measured_on() -> str:
    """Describe the GPU and the versions of everything that compiles for it, or the CPU."""
    if not torch.cuda.is_available():
        return f"CPU, torch {torch.__version__}"
    import triton
    from triton import knobs

    try:
        fa4 = version("flash-attn-4")
    except PackageNotFoundError:
        fa4 = "absent"
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__} "
        f"with ptxas {knobs.nvidia.ptxas.version}, cuDNN {torch.backends.cudnn.version()}, "
        f"flash-attn-4 {fa4}"
    )


def dated(folder: Path, benchmark: str, *details: str) -> Path:
    """Return the path of today's result on this GPU, or on `cpu`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    gpu = gpu.removeprefix("NVIDIA ").replace(" ", "-").lower()
    return folder / ("-".join([str(date.today()), benchmark, gpu, *details]) + ".md")


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def with_sections(head: Sequence[str], sections: Mapping[str, str]) -> str:
    """Return a result's text: the head's paragraphs, then each section under a heading."""
    return "\n\n".join([*head, *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"


def split_sections(text: str) -> tuple[list[str], dict[str, str]]:
    """Split a text made by `with_sections` into its head and sections."""
    head, *rest = text.rstrip("\n").split("\n\n## ")
    parts = (section.partition("\n\n") for section in rest)
    return head.split("\n\n"), {name: body for name, _, body in parts}


def resumed(path: Path, setup: str) -> tuple[list[str], dict[str, str]]:
    """Return head and sections of the result to resume; both empty if there is none yet.

    Raises:
        SystemExit: if the second paragraph of its head is not `setup`.
    """
    if not path.exists():
        return [], {}
    head, sections = split_sections(path.read_text(encoding="utf-8"))
    if head[1] != setup:
        raise SystemExit(
            f"error: {path} was measured with another setup, and --resume would mix the two.\n"
            f"there: {head[1]}\nhere:  {setup}"
        )
    return head, sections


def short(number: float | None) -> str:
    """Format with three significant digits, or one decimal from 100 on."""
    if number is None:
        return "-"
    return f"{number:,.1f}" if number >= 100 else f"{number:.3g}"


def from_command_line(benchmark: Callable[[list[str]], object], usage: str | None) -> None:
    """Run a benchmark of `key=value` arguments; a mistake in them exits with one line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(usage)
    try:
        benchmark(arguments)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
