"""What the benchmarks' results share: what they were measured on, and where and how they lie."""

from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from longreel.data.files import replacing

RESULTS = Path(__file__).parent / "results"


def measured_on() -> str:
    """The GPU and the versions of all that compiles for it; or that there is none."""
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
    """Of today's result on this GPU, or `cpu`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    gpu = gpu.removeprefix("NVIDIA ").replace(" ", "-").lower()
    return folder / ("-".join([str(date.today()), benchmark, gpu, *details]) + ".md")


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def with_sections(head: Sequence[str], sections: Mapping[str, str]) -> str:
    """A result's text: paragraphs, then what belongs to each name under a heading."""
    return "\n\n".join([*head, *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"


def split_sections(text: str) -> tuple[list[str], dict[str, str]]:
    """What `with_sections` put together."""
    head, *rest = text.rstrip("\n").split("\n\n## ")
    parts = (section.partition("\n\n") for section in rest)
    return head.split("\n\n"), {name: body for name, _, body in parts}


def resumed(path: Path, setup: str) -> tuple[list[str], dict[str, str]]:
    """Head and sections of a result to go on with; both empty if there is none yet.

    Raises:
        SystemExit: if the second paragraph of its head is not `setup`.
    """
    if not path.exists():
        return [], {}
    head, sections = split_sections(path.read_text(encoding="utf-8"))
    if head[1] != setup:
        raise SystemExit(
            f"error: {path} was measured otherwise, and --resume would mix the two.\n"
            f"there: {head[1]}\nhere:  {setup}"
        )
    return head, sections
