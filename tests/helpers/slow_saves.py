"""`slow_saves.py SETTINGS`: a training run whose saves take long, so that a kill can meet one."""

import os
import sys
import time

from longreel.launch.commands import main
from longreel.trainer.run import checkpoint

PIECES, PAUSE = 5, 0.01  # of each file, and seconds after each

save_file, rename = checkpoint.save_file, os.rename


def save_slowly(tensors, path):
    save_file(tensors, path)
    whole = path.read_bytes()
    with path.open("wb", buffering=0) as file:
        for piece in range(PIECES):
            file.write(whole[piece * len(whole) // PIECES : (piece + 1) * len(whole) // PIECES])
            time.sleep(PAUSE)


def rename_slowly(*args):
    time.sleep(PAUSE)
    rename(*args)
    time.sleep(PAUSE)


if __name__ == "__main__":
    checkpoint.save_file, os.rename = save_slowly, rename_slowly
    main(["train", *sys.argv[1:]])
