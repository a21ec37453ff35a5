"""Modules over the ops: state and defaults, no maths of their own."""

from .codebook import Codebook as Codebook, update_codebooks as update_codebooks
from .elbo import ELBOLoss as ELBOLoss
from .latent import (
    GaussianLatent as GaussianLatent,
    KLSchedule as KLSchedule,
    PosteriorMonitor as PosteriorMonitor,
)
from .perceptual import LPIPS as LPIPS, PerceptualLoss as PerceptualLoss, StyleLoss as StyleLoss
from .quantize import VectorQuantize as VectorQuantize
from .residual import GroupedResidualVQ as GroupedResidualVQ, ResidualVQ as ResidualVQ
from .scalar import FSQ as FSQ, LFQ as LFQ, SimVQ as SimVQ
from .vgg import VGGTrunk as VGGTrunk
