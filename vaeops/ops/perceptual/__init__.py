"""The perceptual family: distances between the feature maps of a frozen VGG, and their image gradient."""

from .distance import feature_distance as feature_distance
from .features import TargetCache as TargetCache
from .loss import Term as Term, perceptual_loss as perceptual_loss
