"""Checkpoints by themselves; runs that go on from them are in test_loop.py."""

import json

import pytest
import torch

from longreel.trainer.config.values import ConfigError
from longreel.trainer.run import checkpoint


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    progress = {"step": 7, "world_size": 1, "clips": ""}
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"version": 1, "progress": progress}))
    with pytest.raises(ConfigError, match="version 1, .* with version 2: choose another run.dir"):
        checkpoint.load_progress(tmp_path)


def written(folder, step):
    state = checkpoint.State({"a": torch.ones(2)})
    progress = checkpoint.Progress(step, 1, "", [step])
    return checkpoint.save(folder, state, progress, keep_last=3)


def test_who_may_read_a_checkpoint_is_up_to_the_umask(tmp_path):
    """safetensors writes files that their owner alone can read."""
    plain = tmp_path / "plain"
    plain.write_text("")
    saved = written(tmp_path, 1)
    assert {file.stat().st_mode for file in saved.iterdir()} == {plain.stat().st_mode}


def test_checkpoints_that_cannot_be_read_are_skipped_and_named(tmp_path):
    first, second, third = (written(tmp_path, step) for step in (1, 2, 3))
    assert checkpoint.latest(tmp_path) == third
    assert checkpoint.unreadable_after(third, tmp_path) == []
    for path, newest, unread in ((third, second, [third]), (second, first, [second, third])):
        content = (path / checkpoint.TENSORS).read_bytes()
        (path / checkpoint.TENSORS).write_bytes(content[:-3])
        assert checkpoint.latest(tmp_path) == newest
        assert checkpoint.unreadable_after(newest, tmp_path) == unread
    (first / checkpoint.STATE).unlink()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.unreadable_after(None, tmp_path) == [first, second, third]
