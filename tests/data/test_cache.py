"""A file of the cache is found again only under the same settings, and only if it is complete."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from stub_cache import SPEC, Recording, build, never

from longreel.data.cache import Bucket


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": ()}, "buckets is empty"),
        ({"fps": -1.0}, "fps is -1.0: it must be above 0"),
        ({"windows": "some"}, "windows is 'some': choose 'first' or 'all'"),
        ({"stride": -3}, "stride is -3"),
    ],
)
def test_impossible_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    ("change", "clips", "texts"),
    [
        ({"buckets": (Bucket(8, 32, 48),)}, 3, 0),
        ({"buckets": (Bucket(9, 40, 48),)}, 3, 0),
        ({"buckets": (Bucket(9, 32, 40),)}, 3, 0),
        ({"canonical": True}, 3, 0),
        ({"fps": 15}, 3, 0),
        ({"video_encoder": "other"}, 3, 0),
        ({"text_encoder": "other"}, 0, 2),
        ({"windows": "all"}, 3, 0),  # the three further clips of two videos
        ({"stride": 4}, 0, 0),
        ({"fps": 16.0}, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_changed_setting_meets_no_stale_file(folder, cache, change, clips, texts):
    first = build(folder, SPEC, cache)
    calls = Recording()
    second = build(folder, replace(SPEC, **change), cache, calls)
    assert (len(calls.clips), len(calls.captions)) == (clips, texts)
    assert calls.loads == (clips + texts > 0)
    assert second.report.encoded == clips
    assert build(folder, SPEC, cache, never).entries == first.entries


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "foreign"])
def test_a_torn_file_is_encoded_again(folder, cache, damage):
    first = build(folder, SPEC, cache)
    victims = [first.entries[1].latents, first.texts["a dog"]]
    good = [path.read_bytes() for path in victims]
    for path, data in zip(victims, good, strict=True):
        if damage == "foreign":
            save_file({"latents": torch.zeros(1)}, path)
        else:
            torn = {"truncated": data[:-7], "empty": b"", "garbage": b"x" * len(data)}
            path.write_bytes(torn[damage])
    calls = Recording()
    second = build(folder, SPEC, cache, calls)
    assert (len(calls.clips), calls.captions) == (1, ["a dog"])
    assert second.report.encoded == 1 and second.report.reused == 2
    assert [path.read_bytes() for path in victims] == good
