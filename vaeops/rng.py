"""The noise stream: seeds to hand around, and the normals that they draw. See `vaeops.ops.rng` for the definition."""

from .ops.rng import (
    advance as advance,
)
from .ops.rng import (
    fold_in as fold_in,
)
from .ops.rng import (
    make_seed as make_seed,
)
from .ops.rng import (
    normal as normal,
)
from .ops.rng import (
    split as split,
)
