"""Reference models. Each runs on vaeops' kernels or on vaeops.ref by one argument, `ops="fused" | "ref"`."""

from .conv import CelebAVAE as CelebAVAE, ImageVAEOutput as ImageVAEOutput
from .vae import MLPVAE as MLPVAE, VAEOutput as VAEOutput
from .vq import MLPVQVAE as MLPVQVAE, VQVAEOutput as VQVAEOutput
