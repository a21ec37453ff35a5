"""What a model is worth, as numbers: pictures, likelihoods, sets of features, rankings, anomalies, paths.

PSNR and SSIM are torchmetrics', the AUROC scikit-learn's. Written here is what they lack or define otherwise,
and each docstring says which. The latent's health is `vaeops.nn.PosteriorMonitor`, the use of a codebook
`vaeops.perplexity` and `vaeops.usage`.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SSIM_WINDOW = 11
Moments = tuple[np.ndarray, np.ndarray]


def psnr(recon: Tensor, x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 log10((hi - lo)^2 / MSE), in dB; inf where they are equal.

    Args:
        recon, x: [B, C, H, W], floating. Both are clamped to the range.
        value_range: (lo, hi), the least and the greatest value that x can take.

    Returns:
        [B]. Average it over a data set: the mean of an image's PSNR, not the PSNR of the mean error.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_images("psnr", recon, x)
    return peak_signal_noise_ratio(recon, x, value_range, dim=(1, 2, 3), reduction="none")


def ssim(recon: Tensor, x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Structural similarity of each image, in [-1, 1], the mean over its pixels and channels.

    An 11x11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03; images go on by reflection.

    Args:
        recon, x: [B, C, H, W], floating, H and W at least 11. Both are clamped to the range.
        value_range: (lo, hi), the least and the greatest value that x can take.

    Returns:
        [B].

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_images("ssim", recon, x)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim: images must be at least {SSIM_WINDOW}x{SSIM_WINDOW}, the size of its window, "
            f"got {list(x.shape)}"
        )
    return structural_similarity_index_measure(  # type: ignore[return-value]  # no second map is asked for
        recon, x, data_range=value_range, reduction="none"
    )


def iwae_nll(log_weights: Tensor) -> Tensor:
    """An upper bound on -log p(x) from K samples z_k of the posterior, in nats; it falls with K.

        -log 1/K sum_k w_k,   w_k = p(x | z_k) p(z_k) / q(z_k | x)

    `objectives.iwae_bound` with the sign turned, of the sum that a model's `log_weights` gives.

    Args:
        log_weights: [K, *B], log w_k, nats.

    Returns:
        [*B], in log_weights' dtype.

    Source: Burda et al., "Importance Weighted Autoencoders", 2016.
    """
    if log_weights.dim() < 1 or not log_weights.shape[0]:
        raise ValueError(f"iwae_nll: log_weights must be [K, *B] with K >= 1, got {list(log_weights.shape)}")
    return math.log(log_weights.shape[0]) - log_weights.logsumexp(0)


def moments(features: np.ndarray) -> Moments:
    """features [N, D], N >= 2 -> (mean [D], unbiased covariance [D, D]), fp64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments: features must be [N, D] with N >= 2, got {list(features.shape)}")
    features = features.astype(np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def load_moments(path: str | Path) -> Moments:
    """The moments of a features file: a .npy of features [N, D], or a .npz holding mu [D] and sigma [D, D].

    Both are what the usual FID programs write. No pickled content is read.

    Raises:
        ValueError: on another suffix, a .npz without the two, shapes that do not fit.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return moments(np.load(path, allow_pickle=False))
    if path.suffix != ".npz":
        raise ValueError(f"load_moments: a features file is a .npy, or a .npz with mu and sigma, got {path}")
    with np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise ValueError(f"load_moments: {path} must hold mu and sigma, it holds {sorted(file.files)}")
        mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"load_moments: {path} must hold mu [D] and sigma [D, D], "
            f"got {list(mu.shape)} and {list(sigma.shape)}"
        )
    return mu, sigma


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians given by their moments, squared as the FID is:

        |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    The trace of the root is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), which is symmetric: two eigenvalue
    problems in fp64, sound also where fewer samples than dimensions make the covariances singular.
    torchmetrics takes images and a network, and no stored moments.

    Args:
        a, b: (mu [D], sigma [D, D]) each, of `moments` or `load_moments`.

    Source: Dowson & Landau, "The Frechet distance between multivariate normal distributions", 1982; Heusel et
    al., "GANs Trained by a Two Time-Scale Update Rule ...", 2017. Samples bias it upwards: compare values of
    the same N only.
    """
    (mu_a, sigma_a), (mu_b, sigma_b) = a, b
    if mu_a.shape != mu_b.shape:
        raise ValueError(f"frechet: the two must have one width, got {len(mu_a)} and {len(mu_b)} features")
    values, vectors = np.linalg.eigh(sigma_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma_b @ root).clip(0)).sum()
    return float(np.square(mu_a - mu_b).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * cross)


def ranking(scores: Tensor, seen: Tensor, held_out: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Recall@k and NDCG@k of each user, as Mult-VAE defines them; h_r = 1 where the r-th item is held out.

        Recall@k = sum_{r<=k} h_r / min(k, |held out|)
        NDCG@k   = sum_{r<=k} h_r / log2(r + 1)  /  sum_{r<=min(k, |held out|)} 1 / log2(r + 1)

    torchmetrics divides the recall by |held out| and counts only items of a positive score, which logits are
    not; scikit-learn has the NDCG alone. Here one sort serves both.

    Args:
        scores: [U, I], floating, larger is better. Items of equal score rank in their own order.
        seen: [U, I], nonzero where the user is known to have the item: those are not recommended again.
        held_out: [U, I], nonzero where the user has the item and the model was not told.
        k: length of the list, in [1, I].

    Returns:
        (recall [U], ndcg [U]) in [0, 1], fp32; NaN for a user without a held-out item.

    Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018, section 4.2.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"ranking: k must be in [1, {scores.shape[1]}], the number of items, got {k}")
    scores = scores.masked_fill(seen.bool(), -math.inf)
    top = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    held_out = held_out.bool()
    hit = held_out.gather(1, top).float()
    relevant = held_out.sum(1)
    discount = 1 / torch.arange(2, k + 2, device=scores.device).log2()
    ideal = discount.cumsum(0)[relevant.clamp(1, k) - 1]
    recall = hit.sum(1) / relevant.clamp(max=k)
    return recall, torch.where(relevant > 0, (hit * discount).sum(1) / ideal, math.nan)


def auroc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """Area under the ROC curve of a score that should be higher for outliers: P(outlier > inlier), ties half.

    Args:
        inliers: [N]. outliers: [M]. Say, reconstruction errors.
    """
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(inliers), len(outliers)])
    return float(roc_auc_score(truth, np.concatenate([inliers, outliers])))


def largest_step(path: Tensor) -> Tensor:
    """How far a decoded line of the latent jumps at its worst: max_t |x_{t+1} - x_t|, in the data's units.

    Args:
        path: [T, *E], T >= 2: the decodings of T points at equal distances on a line. Compare equal T.

    Returns:
        0-d, in path's dtype.
    """
    if path.dim() < 2 or len(path) < 2:
        raise ValueError(f"largest_step: path must be [T, *E] with T >= 2, got {list(path.shape)}")
    return path.flatten(1).diff(dim=0).norm(dim=1).max()


def _check_images(metric: str, recon: Tensor, x: Tensor) -> None:
    if x.dim() != 4 or recon.shape != x.shape:
        raise ValueError(
            f"{metric}: recon and x must be [B, C, H, W], alike, got {list(recon.shape)} and {list(x.shape)}"
        )
