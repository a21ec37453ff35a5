"""The faces of the notebooks: CelebA's where you have them, or else faces that are drawn here.

A drawn face is a few ellipses. Three attributes of CelebA's say what is drawn, each by a coin of its own;
everything else (colours, size, place, hair, mouth, eyes) is drawn at random.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from vaeops.train import data

NAMES = ("Smiling", "Eyeglasses", "Young")
SHARES = (0.5, 0.35, 0.6)  # of the faces that have each
FINE = 4  # a face is drawn at this many times its size, and made smaller
SKINS = ((255, 224, 196), (241, 194, 155), (224, 172, 125), (198, 134, 85), (141, 85, 50), (90, 56, 37))
HAIRS = ((30, 24, 22), (60, 38, 25), (110, 66, 33), (170, 110, 50), (214, 170, 96), (150, 60, 30))


def load(name: str, split: str, *, side: int, n: int) -> data.Dataset:
    """Faces uint8 [N, 3, side, side] and their attributes.

    name: "celeba", all of a split's, found through VAEOPS_DATA; or "drawn", n of them, of which every split
        has its own.
    """
    if name == "celeba":
        return data.load("celeba", split=split, size=side)
    if name != "drawn":
        raise ValueError(f"name must be 'celeba' or 'drawn', got {name!r}")
    rng = np.random.default_rng([data.SPLITS.index(split), 2020])
    attributes = rng.random((n, len(NAMES))) < SHARES
    images = np.stack([draw(rng, side, *row) for row in attributes]).transpose(0, 3, 1, 2)
    return data.Dataset("drawn faces", images, attributes=attributes, attribute_names=NAMES)


def draw(rng: np.random.Generator, side: int, smiling: bool, eyeglasses: bool, young: bool) -> np.ndarray:
    """One face: uint8 [side, side, 3]."""
    size = side * FINE
    backdrop = _colour(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.55, 0.95))
    shirt = _colour(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8))
    skin = _between(rng, SKINS)
    hair = _between(rng, HAIRS) if young else (int(rng.integers(185, 236)),) * 3
    dark, lips = _shade(skin, 0.72), tuple(int(0.5 * c + 0.5 * r) for c, r in zip(skin, (190, 60, 70)))
    scale, x0, y0 = rng.uniform(0.98, 1.06), rng.uniform(-0.015, 0.015), rng.uniform(-0.01, 0.02)
    wide, apart = rng.uniform(0.265, 0.3), rng.uniform(0.11, 0.12)
    image = Image.new("RGB", (size, size), backdrop)
    pen = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        """Pixel of a point; the face's middle is (0, 0), the picture's border 0.5 away."""
        return size * (0.5 + x0 + scale * x), size * (0.5 + y0 + scale * y)

    def box(x: float, y: float, half_width: float, half_height: float) -> tuple[tuple[float, float], ...]:
        return at(x - half_width, y - half_height), at(x + half_width, y + half_height)

    def thick(share: float) -> int:
        return max(1, round(size * scale * share))

    long_hair = rng.random() < 0.5
    if long_hair:
        pen.rounded_rectangle(box(0, 0.12, wide + 0.07, 0.32), size * 0.08, fill=hair)
    pen.ellipse(box(0, 0.6, 0.42, 0.22), fill=shirt)
    pen.rectangle(box(0, 0.32, 0.1, 0.14), fill=dark)
    pen.ellipse(box(0, -0.08, wide + 0.05, 0.36), fill=hair)
    pen.ellipse(box(0, 0.02, wide, 0.34), fill=skin)
    fringe = rng.uniform(0.17, 0.22)
    pen.chord(box(0, -0.14, wide + 0.02, fringe), 180, 360, fill=hair)
    if not young:
        for y in (-0.125, -0.16):
            pen.line([at(-0.12, y), at(0.12, y)], fill=dark, width=thick(0.012))
        for sign in (-1, 1):
            pen.line([at(sign * 0.1, 0.1), at(sign * 0.15, 0.2)], fill=dark, width=thick(0.014))

    look = rng.uniform(-0.01, 0.01)
    iris = _colour(rng.uniform(0.05, 0.65), 0.6, rng.uniform(0.25, 0.5))
    for sign in (-1, 1):
        pen.ellipse(box(sign * apart, -0.03, 0.055, 0.035), fill=(250, 250, 250))
        pen.ellipse(box(sign * apart + look, -0.03, 0.028, 0.032), fill=iris)
        pen.line([at(sign * (apart - 0.05), -0.095), at(sign * (apart + 0.055), -0.09)],
                 fill=_shade(hair, 0.8), width=thick(0.022))  # fmt: skip
    pen.line([at(0, 0.0), at(0.025, 0.09), at(-0.01, 0.095)], fill=dark, width=thick(0.016))
    mouth = rng.uniform(0.18, 0.195)
    if smiling:
        pen.chord(box(0, mouth - 0.02, 0.12, 0.085), 0, 180, fill=lips)
        pen.chord(box(0, mouth - 0.015, 0.095, 0.045), 0, 180, fill=(255, 252, 245))
    else:
        pen.ellipse(box(0, mouth, rng.uniform(0.06, 0.08), 0.022), fill=lips)
    if eyeglasses:
        frame = _colour(rng.random(), 0.5, rng.uniform(0.05, 0.2))
        for sign in (-1, 1):
            pen.ellipse(box(sign * apart, -0.03, 0.092, 0.085), outline=frame, width=thick(0.026))
            pen.line([at(sign * (apart + 0.09), -0.04), at(sign * wide, -0.06)], fill=frame,
                     width=thick(0.024))  # fmt: skip
        pen.line([at(-apart + 0.085, -0.04), at(apart - 0.085, -0.04)], fill=frame, width=thick(0.024))
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def _shade(colour: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(int(share * c) for c in colour)


def _between(rng: np.random.Generator, colours: tuple[tuple[int, int, int], ...]) -> tuple[int, ...]:
    """A colour on the line between two neighbours of a list."""
    i, share = int(rng.integers(len(colours) - 1)), rng.random()
    return tuple(int(a + share * (b - a)) for a, b in zip(colours[i], colours[i + 1]))
