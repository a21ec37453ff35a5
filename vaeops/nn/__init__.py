"""Modules over the ops: state and defaults, no maths of their own."""

from .latent import (
    GaussianLatent as GaussianLatent,
)
from .latent import (
    KLSchedule as KLSchedule,
)
from .latent import (
    PosteriorMonitor as PosteriorMonitor,
)
