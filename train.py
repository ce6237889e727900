"""`accelerate launch train.py recipe=NAME key=value ...`"""

import sys

from longreel.launch.commands import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
