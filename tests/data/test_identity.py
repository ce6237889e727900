"""Encoders are identified by fields; cache keys and older headers stay valid."""

from dataclasses import asdict, replace

import pytest
from stub_cache import BUCKET, SPEC, build, never

from longreel.data.cache import Bucket, CacheSpec
from longreel.data.files import read_header
from longreel.data.identity import EncoderIdentity

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
COMMIT = "0fad780a534b6463e45facd96134c9f345acfa5b"
IDENTITY = EncoderIdentity("wan", MODEL, None, COMMIT, "torch.bfloat16")


def test_keys_are_those_of_existing_caches():
    """These keys were computed before encoders were identified by fields."""
    spec = CacheSpec((Bucket(161, 480, 832),), 16, IDENTITY, IDENTITY)
    assert spec.video_key(spec.buckets[0]) == "16fe8cb96a003aaf"
    assert spec.text_key == "869ab8c0d1c185e7"


def test_a_cache_that_was_filled_under_the_string_is_complete(folder, cache):
    old = replace(SPEC, video_encoder=str(IDENTITY), text_encoder=str(IDENTITY))
    new = replace(SPEC, video_encoder=IDENTITY, text_encoder=IDENTITY)
    first = build(folder, old, cache)
    assert build(folder, new, cache, never).entries == first.entries
    assert old.video_key(BUCKET) == new.video_key(BUCKET)


def test_headers_hold_the_fields(folder, cache):
    spec = replace(SPEC, video_encoder=IDENTITY, text_encoder=IDENTITY)
    entry = build(folder, spec, cache).entries[0]
    for path in (entry.latents, entry.text):
        assert read_header(path)["encoder"] == asdict(IDENTITY)
        assert EncoderIdentity.parse(read_header(path)["encoder"]) == IDENTITY


@pytest.mark.parametrize(
    "identity",
    [
        IDENTITY,
        replace(IDENTITY, revision="refs/pr/3"),
        replace(IDENTITY, model="/disk/models@2/a:b", snapshot="a b", dtype="torch.float32"),
        replace(IDENTITY, snapshot="model@2"),
        replace(IDENTITY, model=None),
    ],
)
def test_older_headers_are_read(identity):
    assert EncoderIdentity.parse(str(identity)) == identity


@pytest.mark.parametrize("header", ["tiny-vae", "a:b:c:d", None, 3, {"family": "wan"}, {"x": 1}])
def test_other_headers_are_refused(header):
    with pytest.raises(ValueError, match="does not identify an encoder"):
        EncoderIdentity.parse(header)
