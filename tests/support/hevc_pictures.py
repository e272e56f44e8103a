"""Pictures that the HEVC coders are tested on, each made of its name: the same on every machine."""

from typing import NamedTuple

import numpy as np

from kvfetcher.format.pictures import PlaneGeometry


class Picture(NamedTuple):
    geometry: PlaneGeometry
    planes: np.ndarray
    """[1, P, Y, X]"""


def noise(geometry, rng, deviation, *, gain=0.0):
    """Rounded Laplacian rows around mid-grey, whose deviation falls from row to row like a power."""
    _, planes, rows, width = geometry.shape
    falling = deviation * np.linspace(0.02, 1, rows)[::-1, None] ** 1.5
    louder = np.exp(rng.normal(0, gain, width))
    values = np.rint(rng.laplace(0, 2**-0.5, (planes, rows, width)) * falling * louder)
    grey = 1 << (geometry.bit_depth - 1)
    return np.clip(values + grey, 0, 2 * grey - 1).astype(geometry.dtype)[None]


def constant(geometry, _, value):
    return np.full(geometry.shape, value, geometry.dtype)


def checkerboard(geometry, _):
    board = np.indices(geometry.shape).sum(axis=0) % 2
    return (board * ((1 << geometry.bit_depth) - 1)).astype(geometry.dtype)


def extremes(geometry, rng):
    """Only the lowest and the highest value, mostly in runs."""
    bits = np.cumsum(rng.random(geometry.shape) < 0.1, axis=-1) % 2
    return (bits * ((1 << geometry.bit_depth) - 1)).astype(geometry.dtype)


def white(geometry, rng):
    return rng.integers(0, 1 << geometry.bit_depth, geometry.shape).astype(geometry.dtype)


def sparse(geometry, rng):
    """Mid-grey but for one sample in 300, of any value."""
    grey = np.full(geometry.shape, 1 << (geometry.bit_depth - 1), geometry.dtype)
    return np.where(rng.random(geometry.shape) < 1 / 300, white(geometry, rng), grey)


# name: width, height, bit depth, chroma, maker, its arguments
_GOLDEN = {
    "rows_8": (256, 320, 8, "4:4:4", noise, (3.0,)),
    "rows_10": (256, 192, 10, "4:4:4", noise, (2.0,)),
    "rows_12": (192, 160, 12, "4:4:4", noise, (12.0,)),
    "tokens_of_other_gain": (512, 160, 8, "4:4:4", noise, (2.0,)),
    "window": (201, 167, 10, "4:4:4", noise, (1.5,)),
    "window_420": (202, 166, 8, "4:2:0", noise, (4.0,)),
    "wide_420": (320, 160, 10, "4:2:0", noise, (20.0,)),
    "faint": (288, 256, 8, "4:4:4", noise, (0.3,)),
    "loud_12": (160, 160, 12, "4:4:4", noise, (200.0,)),
    "grey": (160, 160, 8, "4:4:4", constant, (128,)),
    "black": (170, 150, 10, "4:4:4", constant, (0,)),
    "checkerboard": (160, 144, 8, "4:4:4", checkerboard, ()),
    "extremes": (160, 160, 12, "4:4:4", extremes, ()),
    "sparse": (256, 256, 12, "4:4:4", sparse, ()),
    "pcm_8": (160, 160, 8, "4:4:4", white, ()),
    "pcm_window_12": (150, 145, 12, "4:4:4", white, ()),
    "pcm_420": (150, 146, 10, "4:2:0", white, ()),
}
GOLDEN = tuple(_GOLDEN)
PCM = tuple(name for name in GOLDEN if name.startswith("pcm"))
"""Which a GPU coder leaves to the CPU's."""


def golden_picture(name: str) -> Picture:
    """The picture of one of `GOLDEN`."""
    width, height, bit_depth, chroma, make, arguments = _GOLDEN[name]
    geometry = PlaneGeometry(1, width, height, bit_depth, chroma)
    rng = np.random.default_rng(list(name.encode()))
    options = {"gain": 0.5} if name == "tokens_of_other_gain" else {}
    return Picture(geometry, make(geometry, rng, *arguments, **options))
