"""The published models, by their numbers of parameters."""

from __future__ import annotations

import pytest

from longreel.trainer.config.recipe import load, recipe_names
from longreel.trainer.families import FAMILIES
from longreel.trainer.families.published import PUBLISHED, blank_encoders, blank_transformer


@pytest.mark.parametrize("path, billions", [
    ("hunyuanvideo-community/HunyuanVideo", (12.82, 0.246, 7.6)),
    ("genmo/mochi-1-preview", (10.03, 0.460, 4.76)),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (14.29, 0.127, 5.68)),
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (1.42, 0.127, 5.68)),
])  # fmt: skip
def test_parameters_are_those_published(path, billions):
    """Transformer, VAE and text encoders are counted; Llama counts without its head, T5 its
    encoder."""
    family = next(f for n, f in FAMILIES.items() if n in path.lower().replace("2.1", ""))
    vae, texts = blank_encoders(family, path, None)
    models = [[blank_transformer(family, path, None)], [vae], texts]
    counts = [sum(p.numel() for m in group for p in m.parameters()) / 1e9 for group in models]
    assert counts == [pytest.approx(count, rel=6e-3) for count in billions]


def test_every_recipe_is_of_a_published_model():
    paths = {load([f"recipe={name}"]).model.path for name in recipe_names()}
    assert paths == {*PUBLISHED, "tiny"}
