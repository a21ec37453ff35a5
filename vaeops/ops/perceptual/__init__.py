"""The perceptual family: distances between the feature maps of a frozen VGG, and their image gradient."""

from . import distance as distance, loss as loss, trunk as trunk
