"""`python watched.py FOLDER`: pairs of processes under a watch, one pair for each way to fail.

Forked, so that libraries are imported once. What a process says goes to FOLDER/CASE-RANK, the code
that it exits with and the seconds since the failure to FOLDER/codes.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from longreel.trainer.run.watchdog import Watch


def fail(case: str) -> None:
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "cut off":  # as a host without network: its connections stay open
        os.kill(os.getpid(), signal.SIGSTOP)
    if case == "stuck":
        time.sleep(3600)
    if case == "raises":
        raise ValueError("clip 7 is damaged")


def meet(file: Path, rank: int) -> dist.Store:
    """A store that rank 0 serves, on a free port that the file tells."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        file.with_suffix(".new").write_text(str(store.port))
        file.with_suffix(".new").rename(file)
        return store
    while not file.exists():
        time.sleep(0.05)
    return dist.TCPStore("127.0.0.1", int(file.read_text()), 2, False)


def work(case: str, rank: int, folder: Path) -> None:
    output = os.open(folder / f"{case}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    dist.init_process_group("gloo", store=meet(folder / case, rank), rank=rank, world_size=2)
    with Watch(3, beat=0.2, gone=2, grace=1) as watch:
        for step in range(4):
            watch.enter(f"step {step}: reading clips")
            if step == 3 and rank == 1:
                fail(case)
            watch.enter(f"step {step}: exchange")
            dist.all_reduce(torch.ones(1))
    print("complete", flush=True)


def main(folder: Path, cases: list[str]) -> None:
    children = {}
    for case in cases:
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(case, rank, folder)
                    code = 0
                except SystemExit as error:
                    print(error.code, flush=True)
                except ValueError as error:
                    print(f"ValueError: {error}", flush=True)
                finally:
                    os._exit(code)
            children[child] = f"{case}-{rank}"
    began, codes = time.monotonic(), {}
    waiting = dict(children)
    while waiting and time.monotonic() - began < 60:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            code = os.waitstatus_to_exitcode(status)
            codes[waiting.pop(child)] = (code, time.monotonic() - began)
        time.sleep(0.05)
        if set(waiting.values()) == {"cut off-1"}:
            break
    for child in waiting:
        os.kill(child, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
