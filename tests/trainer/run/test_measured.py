"""Which columns of metrics.csv are measured, and so differ between runs that learn the same."""

import time

from runs import assert_the_same_run, train

from longreel.trainer import loop, step
from longreel.trainer.run import metrics
from longreel.trainer.run.attention_speedup import Speedup


def test_what_is_measured_does_not_tell_runs_apart(arguments, tmp_path, monkeypatch):
    """On a machine of another speed and memory just the measured columns differ, all of them."""
    tables, run_dirs = [], []
    clock = time.perf_counter
    for name, slower in (("one", 1.0), ("other", 3.0)):
        monkeypatch.setattr(time, "perf_counter", lambda slower=slower: slower * clock())
        monkeypatch.setattr(step, "peak_memory_gib", lambda _, gib=slower: gib)
        found = Speedup(dense_ms=6.0, sparse_ms=slower)
        monkeypatch.setattr(loop, "measure_speedup", lambda *_, found=found, **__: found)
        run = [f"run.dir={tmp_path / name}", "validate.prompts=a wave"]
        run_dirs.append(train(arguments, *run).run_dir)
        tables.append(metrics.read_rows(run_dirs[-1] / "metrics.csv"))
    pairs = list(zip(*tables, strict=True))
    differ = {name for name in metrics.COLUMNS if any(a[name] != b[name] for a, b in pairs)}
    assert differ == metrics.MEASURED
    assert_the_same_run(*run_dirs)
