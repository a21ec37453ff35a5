"""The noise stream: seeds to hand around, and the normals that they draw. Defined in `vaeops.ops.rng`."""

from .ops.rng import (
    advance as advance,
    fold_in as fold_in,
    make_seed as make_seed,
    normal as normal,
    split as split,
)
