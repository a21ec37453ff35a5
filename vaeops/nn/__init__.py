"""Modules over the ops: state and defaults, no maths of their own."""

from .latent import (
    GaussianLatent as GaussianLatent,
    KLSchedule as KLSchedule,
    PosteriorMonitor as PosteriorMonitor,
)
