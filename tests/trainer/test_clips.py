"""The settings under `data` reach the data layer under the same names."""

from dataclasses import MISSING, fields

from longreel.data.listing import SourceSpec
from longreel.trainer.clips import source_spec
from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Data
from longreel.trainer.job import Job


def default(field):
    return field.default_factory() if field.default is MISSING else field.default


def test_every_field_of_a_source_is_a_setting_with_the_same_default():
    settings = {field.name: field for field in fields(Data)}
    for field in fields(SourceSpec):
        if field.name == "cache_dir":
            continue
        if field.name == "path":  # a source needs it; a run may draw its clips instead
            assert field.default is MISSING and settings["path"].default is None
            continue
        assert field.default == default(settings[field.name]), field.name


def test_settings_of_the_source_are_passed_on(tmp_path):
    given = {
        "source": "datasets",
        "path": "someone/videos",
        "subset": "small",
        "split": "test",
        "revision": "main",
        "video": "clip",
        "caption": "words",
        "filter": "score > 3",
        "top_k": 5,
        "top_by": "score",
    }
    assert {*given, "cache_dir"} == {field.name for field in fields(SourceSpec)}
    options = [f"data.{name}={value}" for name, value in given.items()]
    job = Job.from_config(load(["recipe=tiny_wan", f"cache.dir={tmp_path}", *options]))
    assert source_spec(job) == SourceSpec(**given, cache_dir=str(tmp_path))
