"""Checkpoints by themselves; runs that go on from them are in test_loop.py."""

import json

import pytest

from longreel.trainer import checkpoint
from longreel.trainer.config import ConfigError


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    progress = {"step": 7, "world_size": 1, "clips": ""}
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"version": 1, "progress": progress}))
    with pytest.raises(ConfigError, match="version 1, .* with version 2: choose another run.dir"):
        checkpoint.load_progress(tmp_path)
