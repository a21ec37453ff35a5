"""Reference models. Each runs on vaeops' kernels or on vaeops.ref by one argument, `ops="fused" | "ref"`."""

from .conv import CelebAVAE as CelebAVAE, ImageVAEOutput as ImageVAEOutput
from .diffusion import TinyDDPM as TinyDDPM
from .prior import CodePrior as CodePrior, decode_codes as decode_codes, encode_dataset as encode_dataset
from .protocol import Terms as Terms
from .recommend import MultVAE as MultVAE, MultVAEOutput as MultVAEOutput
from .vae import MLPVAE as MLPVAE, VAEOutput as VAEOutput
from .vq import MLPVQVAE as MLPVQVAE, VQVAE as VQVAE, VQVAE2 as VQVAE2, VQVAEOutput as VQVAEOutput
