"""Does a LoRA under a sparse mask extend a video model? Compare every pattern at equal density.

    python benchmarks/extend.py dry=true                 print the estimated cost
    python benchmarks/extend.py seconds=540              run for this long; repeat to resume
    python benchmarks/extend.py only=cube                one pattern's rows
    python benchmarks/extend.py page=only                fill docs/length_extension.md
    python benchmarks/extend.py scale=tiny out=FOLDER    the whole chain on a CPU, in minutes

Keys: scale, out, only, seeds, seconds, dry, page; see `length_extension.run.Options`. Exits with
status 3 while cells are left.
"""

import sys


def main() -> None:
    """Import late, because the processes that measure clips import this file too."""
    from length_extension.run import Options, run

    from longreel.trainer.config.values import ConfigError, parse

    try:
        done = run(parse(Options, sys.argv[1:]))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    sys.exit(0 if done else 3)


if __name__ == "__main__":
    main()
