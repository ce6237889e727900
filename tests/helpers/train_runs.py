"""`torchrun train_runs.py RUNS`: training runs, JSON lists of arguments, one after another."""

import json
import sys

from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.loop import train

for arguments in json.loads(sys.argv[1]):
    train(Job.from_config(load(arguments)))
