"""Triton kernels of perceptual losses: launchers with the arguments of the low-level ops."""

from .distance import (
    feature_distance_bwd as feature_distance_bwd,
    feature_distance_fwd as feature_distance_fwd,
)
from .trunk import (
    perceptual_fwd as perceptual_fwd,
    vgg_batchnorm_bwd as vgg_batchnorm_bwd,
    vgg_batchnorm_fwd as vgg_batchnorm_fwd,
    vgg_features_bwd as vgg_features_bwd,
    vgg_features_fwd as vgg_features_fwd,
    vgg_pack as vgg_pack,
)
