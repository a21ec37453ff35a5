"""Reference models. Each runs on vaeops' kernels or on vaeops.ref by one argument, `ops="fused" | "ref"`.

`create(preset)` makes one of `presets()`. They share no base, but a protocol:

    input_shape, input_range    of a sample x; the range is None where values are taken as they are
    classes, weights            how many labels the model takes (0: none); the default weight of each loss
    terms(x, label)             -> Terms(losses, monitors): what training adds up, and what it may log
    reconstruct(x, label)       in input_range, without noise         (models that reconstruct)
    sample(n, seed, label)      in input_range                        (models that sample)
    encode(x), decode(code)     VAEs: (mu, logvar); autoencoders: z; VQ models: indices

All of a call's noise follows from `seed`. Batch norm and dropout go by `.train()` and `.eval()`, as ever.
"""

from .ae import (
    Autoencoder as Autoencoder,
    ConvAutoencoder as ConvAutoencoder,
    DenoisingAutoencoder as DenoisingAutoencoder,
    MLPAutoencoder as MLPAutoencoder,
    SparseAutoencoder as SparseAutoencoder,
)
from .conv import (
    CelebAVAE as CelebAVAE,
    CelebAVAEXL as CelebAVAEXL,
    ConvVAE as ConvVAE,
    ConvVAESmall as ConvVAESmall,
)
from .diffusion import TinyDDPM as TinyDDPM
from .presets import create as create, load as load, presets as presets, save as save
from .prior import CodePrior as CodePrior, decode_codes as decode_codes, encode_dataset as encode_dataset
from .protocol import Terms as Terms
from .recommend import MultVAE as MultVAE, MultVAEOutput as MultVAEOutput
from .vae import MLPVAE as MLPVAE, VAE as VAE, VAEOutput as VAEOutput, WorkshopVAE as WorkshopVAE
from .vq import MLPVQVAE as MLPVQVAE, VQVAE as VQVAE, VQVAE2 as VQVAE2, VQVAEOutput as VQVAEOutput
