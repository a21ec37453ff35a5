"""Every metric against another definition of it: a formula in NumPy, SciPy, scikit-learn, a closed form."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
metrics = pytest.importorskip("sklearn.metrics")
linalg = pytest.importorskip("scipy.linalg")

from vaeops import objectives  # noqa: E402
from vaeops.train.metrics import (  # noqa: E402
    auroc,
    frechet,
    iwae_nll,
    largest_step,
    load_moments,
    moments,
    psnr,
    ranking,
    ssim,
)


def test_psnr_of_a_known_error():
    x = torch.full((3, 1, 4, 4), 0.5)
    recon = x + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(psnr(recon, x, (0, 1)), torch.tensor([20.0, 40.0, math.inf]))
    torch.testing.assert_close(psnr(2 * recon - 1, 2 * x - 1, (-1, 1))[:2], torch.tensor([20.0, 40.0]))
    assert psnr(torch.full((1, 1, 4, 4), 9.0), torch.ones(1, 1, 4, 4), (0, 1)) == math.inf  # clamped


def test_ssim():
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ssim(x, x, (0, 1)), torch.ones(2))
    # Of two constant images only the luminance term is left: (2ab + C1) / (a^2 + b^2 + C1).
    a, b, c1 = 0.2, 0.6, 0.01**2
    flat = torch.ones(1, 1, 11, 11).double()
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert float(ssim(a * flat, b * flat, (0, 1))) == pytest.approx(expected, rel=1e-6)
    noisy = [float(ssim(x + sigma * torch.randn_like(x), x, (0, 1)).mean()) for sigma in (0.05, 0.2)]
    assert 1 > noisy[0] > noisy[1] > 0
    other = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ssim(9 * other, 9 * x, (0, 9)), ssim(other, x, (0, 1)))


def test_images_that_are_refused():
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"ssim: images must be at least 11x11.*\[2, 1, 8, 8\]"):
        ssim(x, x, (0, 1))
    with pytest.raises(ValueError, match=r"psnr: recon and x must be .*\[2, 64\] and \[2, 1, 8, 8\]"):
        psnr(x.flatten(1), x, (0, 1))


def test_iwae_nll_of_a_linear_gaussian_model():
    """x = z + noise with z, noise ~ N(0, 1): log p(x) = log N(x; 0, 2), and the true posterior makes every
    weight p(x)."""
    x, std = torch.tensor([-1.0, 0.3, 2.0]).double(), 0.5**0.5
    exact = 0.5 * (x.square() / 2 + math.log(2 * math.pi * 2))

    def weights(k, mean, deviation):
        z = mean + deviation * torch.randn(k, 3).double()
        normal = torch.distributions.Normal
        log_joint = normal(z, 1.0).log_prob(x) + normal(0.0, 1.0).log_prob(z)
        return log_joint - normal(mean, deviation).log_prob(z)

    torch.testing.assert_close(iwae_nll(weights(1, x / 2, std)), exact)
    rough = weights(4096, torch.zeros(3).double(), torch.ones(3).double())
    bounds = [float((iwae_nll(rough.view(k, -1, 3)) - exact).mean()) for k in (1, 16, 256)]
    assert bounds[0] > bounds[1] > bounds[2] > -0.02
    assert bounds[2] < 0.05
    zero = torch.zeros_like(rough)
    torch.testing.assert_close(iwae_nll(rough), -objectives.iwae_bound(rough, zero, zero))
    with pytest.raises(ValueError, match=r"log_weights must be .*\[0, 3\]"):
        iwae_nll(torch.zeros(0, 3))


@pytest.mark.parametrize("n", [500, 5])  # 5: singular covariances
def test_frechet(n):
    source = np.random.default_rng(0)
    a = source.normal(size=(n, 8)) @ source.normal(size=(8, 8))
    b = source.normal(size=(2 * n, 8)) + 0.3
    (mu_a, sigma_a), (mu_b, sigma_b) = moments(a), moments(b)
    root = np.real(linalg.sqrtm(sigma_a @ sigma_b))
    expected = np.square(mu_a - mu_b).sum() + np.trace(sigma_a + sigma_b - 2 * root)
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, rel=1e-5)
    assert frechet(moments(b), moments(a)) == pytest.approx(expected, rel=1e-5)
    assert frechet(moments(a), moments(a + 2)) == pytest.approx(8 * 4, rel=1e-6)
    assert abs(frechet(moments(a), moments(a))) < 1e-5 * np.trace(sigma_a)


def test_frechet_is_torchmetrics_with_features_for_images():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Identity):
        num_features = 8

    a, b = torch.randn(300, 8).double(), 1 + 2 * torch.randn(200, 8).double()
    theirs = FrechetInceptionDistance(Features()).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet(moments(a.numpy()), moments(b.numpy())) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_feature_files(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.save(tmp_path / "f.npy", features)
    mu, sigma = load_moments(tmp_path / "f.npy")
    np.testing.assert_allclose(sigma, np.cov(features.T), rtol=1e-6)
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    np.testing.assert_array_equal(load_moments(tmp_path / "s.npz")[1], sigma)
    np.savez(tmp_path / "other.npz", mean=mu)
    np.savez(tmp_path / "wide.npz", mu=mu, sigma=sigma[:2])
    np.save(tmp_path / "one.npy", features[:1])
    for name, error in (("f.pkl", "got .*f.pkl"), ("other.npz", r"it holds \['mean'\]"),
                        ("wide.npz", r"got \[3\] and \[2, 3\]"), ("one.npy", r"got \[1, 3\]")):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            load_moments(tmp_path / name)
    with pytest.raises(ValueError, match="one width, got 3 and 2 features"):
        frechet((mu, sigma), (mu[:2], sigma[:2, :2]))


def test_ranking_by_hand():
    scores = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]] * 3)
    seen = torch.tensor([[1, 0, 0, 0, 0]] * 3)  # the list is items 1, 2, 3, 4
    held_out = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    recall, ndcg = ranking(scores, seen, held_out, 2)
    first, second = 1.0, 1 / math.log2(3)
    torch.testing.assert_close(recall, torch.tensor([0.5, 0.5, math.nan]), equal_nan=True)
    expected = torch.tensor([first / (first + second), second / (first + second), math.nan])
    torch.testing.assert_close(ndcg, expected, equal_nan=True)
    assert ranking(scores, seen, held_out, 4)[0][:2].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\], the number of items, got 6"):
        ranking(scores, seen, held_out, 6)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_ndcg_is_scikit_learns(k):
    scores, held_out = torch.randn(9, 60), torch.rand(9, 60) < 0.2
    held_out[:, 0] = True
    recall, ndcg = ranking(scores, torch.zeros(9, 60), held_out, k)
    theirs = metrics.ndcg_score(held_out.numpy(), scores.numpy(), k=k)
    assert float(ndcg.mean()) == pytest.approx(theirs, rel=1e-5)
    assert k < 60 or recall.tolist() == [1] * 9


def test_a_seen_item_takes_no_place_and_ties_keep_their_order():
    scores, held_out = torch.zeros(1, 6), torch.tensor([[0, 0, 0, 1, 0, 0]])
    seen = torch.tensor([[1, 0, 1, 0, 0, 0]])
    places = [float(ranking(scores, seen, held_out, k)[0]) for k in (1, 2)]
    assert places == [0, 1]  # items 1, 3, 4, 5


def test_auroc():
    inliers, outliers = np.array([0.1, 0.2, 0.4]), np.array([0.4, 0.9])
    assert auroc(inliers, outliers) == pytest.approx((2 + 0.5 + 3) / 6)
    assert auroc(-outliers, -inliers) == pytest.approx((2 + 0.5 + 3) / 6)


def test_largest_step():
    path = torch.tensor([0.0, 1.0, 1.5, 4.5]).view(4, 1, 1).expand(4, 2, 2)
    assert float(largest_step(path)) == pytest.approx(3 * 2)
    with pytest.raises(ValueError, match=r"T >= 2, got \[1, 2\]"):
        largest_step(torch.zeros(1, 2))
