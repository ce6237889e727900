"""Tone-map HDR pictures to standard dynamic range; untreated, they would look grey in training.

Transfer functions are those of SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG), as given in BT.2100. The
reference white of 203 cd/m2 is that of BT.2408. Highlights are compressed by Reinhard's extended
operator.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics as H.273 numbers them
TRANSFERS = (PQ, HLG)
WHITE, PEAK = 203.0, 1000.0  # cd/m2 of diffuse white and of full white
# Linear light of BT.2020 primaries to BT.709 primaries (BT.2087).
TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2020 weights


def tone_map(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Convert uint16 BT.2020 RGB `[..., 3]` to uint8 BT.709 RGB. transfer: PQ or HLG."""
    linear = _to_light(transfer)[pixels]  # in units of WHITE
    luminance = linear @ LUMINANCE
    if transfer == HLG:  # from scene light to a display of PEAK cd/m2, whose gamma is 1.2
        scale = np.maximum(luminance, 1e-6) ** 0.2 * (PEAK / WHITE)
        linear, luminance = linear * scale[..., None], luminance * scale
    peak = PEAK / WHITE
    rolled = (1 + luminance / peak**2) / (1 + luminance)
    # Chosen so that diffuse white comes out as bright as in SDR video.
    exposure = 1.6
    mapped = np.clip((linear * (rolled * exposure)[..., None]) @ TO_709.T, 0, 1)
    return np.rint(mapped ** (1 / 2.4) * 255).astype(np.uint8)


@lru_cache(maxsize=2)
def _to_light(transfer: int) -> np.ndarray:
    """Return the linear light of each of the 65,536 codes.

    PQ: absolute light in units of WHITE. HLG: scene light, 0 to 1.
    """
    code = np.linspace(0, 1, 1 << 16)
    if transfer == PQ:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = code ** (1 / m2)
        light = 10000 / WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)
