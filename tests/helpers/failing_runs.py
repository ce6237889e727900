"""`failing_runs.py FAILURE RUNS`: training runs, JSON lists of arguments, one after another, the
last of which fails as given: `{"kind": "signal", "rank": 1, "step": 2}`.

kind: `signal` (SIGUSR1), `kill` (SIGKILL), `hang`; at the forward of a step on one process. `slow`:
that process takes SLOW seconds more to validate the step, and to save it.
"""

import json
import os
import signal
import sys
import time

import torch.distributed as dist

from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.loop import train
from longreel.trainer.run.saving import Saver
from longreel.trainer.sampling.validate import Validator
from longreel.trainer.step import Learner

SLOW = 8.0


def fail(kind: str) -> None:
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(3600)


def slow_down(rank: int, step: int) -> None:
    validate, save = Validator.run, Saver.save

    def sleep(current: int) -> None:
        if (dist.get_rank(), current) == (rank, step):
            time.sleep(SLOW)

    def slow_validate(self, current):
        sleep(current)
        validate(self, current)

    def slow_save(self, state, progress):
        sleep(progress.step)
        return save(self, state, progress)

    Validator.run, Saver.save = slow_validate, slow_save


def main(failure: dict, runs: list[list[str]]) -> None:
    if failure.get("kind") == "slow":
        slow_down(failure["rank"], failure["step"])
    for index, arguments in enumerate(runs):
        loss = Learner.loss

        def failing(self, batch, step, micro, loss=loss):
            if (dist.get_rank(), step) == (failure["rank"], failure["step"]):
                fail(failure["kind"])
            return loss(self, batch, step, micro)

        if index == len(runs) - 1 and failure:
            Learner.loss = failing
        train(Job.from_config(load(arguments)))


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
