"""What the lessons print and claim, on the fused ops."""

from functools import partial

import pytest
import torch
from torch import nn

from vaeops import objectives
from vaeops.models import create
from vaeops.nn import PosteriorMonitor

TINY_LOG = """\
epoch=001 recon=0.5903 kl=0.0293 loss=0.5917
epoch=050 recon=0.0335 kl=0.9007 loss=0.0785
epoch=100 recon=0.0261 kl=0.8229 loss=0.0673
epoch=200 recon=0.0244 kl=0.7138 loss=0.0601
generated_points
[[1.075, -0.014], [-0.997, -0.001], [-1.118, -0.054], [0.553, 0.041], [0.74, 0.021]]"""


@pytest.mark.parametrize("ops", ["fused", "ref"])
def test_the_lesson_on_points_prints_its_text(ops):
    """Points, initial weights and noise come from torch's generator, in the lesson's order."""
    model = create("tiny-2d", ops=ops)
    torch.manual_seed(4)
    centers = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.cat([torch.randn(128, 2) * 0.15 + center for center in centers])
    first, mu, logvar, third, last = (
        nn.Linear(i, o) for i, o in ((2, 16), (16, 2), (16, 2), (2, 16), (16, 2))
    )
    heads = nn.Linear(16, 4, device="meta")
    heads.weight = nn.Parameter(torch.cat((mu.weight, logvar.weight)))
    heads.bias = nn.Parameter(torch.cat((mu.bias, logvar.bias)))
    model.encoder[0], model.encoder[2], model.decoder[0], model.decoder[2] = first, heads, third, last
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    lines = []
    for epoch in range(1, 201):
        losses = model.terms(x, eps=torch.randn(256, 2)).losses
        loss = sum(weight * losses[name].sum() for name, weight in model.weights.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch in (1, 50, 100, 200):
            recon, kl = losses["recon"].item(), losses["kl"].mean().item()
            lines.append(f"{epoch=:03d} {recon=:.4f} {kl=:.4f} loss={loss.item():.4f}")
    points = model.decode(torch.randn(5, 2)).tolist()
    lines += ["generated_points", str([[round(value, 3) for value in point] for point in points])]
    assert "\n".join(lines) == TINY_LOG


def test_uniform_noise_reports_a_lower_loss_and_is_a_worse_model():
    """The workshop's slip, on the digits inside scikit-learn; the judge is the loss with normal noise."""
    digits = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().data / 16).float()
    reported, judged = {}, {}
    for noise in ("normal", "uniform"):
        torch.manual_seed(0)
        model = create("workshop-vae", in_dim=64, latent=8, noise=noise)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        last = []
        for step in range(80):
            x = digits[torch.randint(1500, (128,))]
            losses = model.terms(x, seed=torch.tensor([step, 0])).losses
            loss = losses["recon"] + losses["kl"].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last.append(loss.detach())
        reported[noise] = float(torch.stack(last[-20:]).mean())
        model.noise = "normal"
        with torch.no_grad():
            losses = model.terms(digits[1500:], seed=torch.tensor([9, 0])).losses
        judged[noise] = float(losses["recon"] + losses["kl"].sum())
    print(f"reported {reported}, held out with normal noise {judged}")
    assert reported["uniform"] < reported["normal"]
    assert judged["uniform"] > judged["normal"]


@pytest.fixture
def one_thread():
    """The layers are small: on a busy machine threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(model, x, steps, lr, kl_term=torch.sum):
    """Adam on batches of 128; kl_term: what the objective makes of the KL of each dim."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    source = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(x), (128,), generator=source)
        losses = model.terms(x[rows], seed=torch.tensor([step, 0])).losses
        terms = {name: kl_term(loss) if name == "kl" else loss for name, loss in losses.items()}
        optimizer.zero_grad()
        sum(model.weights[name] * term for name, term in terms.items()).backward()
        optimizer.step()
    return model.eval()


def test_a_heavy_kl_collapses_the_posterior_and_free_bits_keep_it(one_thread):
    """The monitor flags the one, with no unit in use, and not the other."""
    digits = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().data / 16).float()
    found = {}
    for floor in (0.0, 0.25):
        torch.manual_seed(0)
        model = create("vae-mlp", in_dim=64, hidden=(64,), latent=8, beta=50.0)
        trained(model, digits, 300, 3e-3, partial(objectives.free_bits, floor=floor))
        monitor = PosteriorMonitor(8)
        with torch.no_grad():
            mu, _ = model.encode(digits)
            monitor.update(mu, model.terms(digits).losses["kl"])
        found[floor] = monitor.summary()
    print(found)
    assert found[0.0]["collapsed"] and found[0.0]["active_units"] == 0
    assert not found[0.25]["collapsed"] and found[0.25]["active_units"] > 0
    assert found[0.25]["kl"] > 0.25


def test_a_linear_autoencoder_learns_what_pca_does(one_thread):
    """Its error lies between those of PCA with as many components and with one less."""
    digits = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().data / 16).float()
    decomposition = pytest.importorskip("sklearn.decomposition")

    def best(components):
        pca = decomposition.PCA(components).fit(digits.numpy())
        return float(((digits.numpy() - pca.inverse_transform(pca.transform(digits.numpy()))) ** 2).mean())

    torch.manual_seed(0)
    model = create("ae-mlp", in_dim=64, hidden=(), latent=6, sigmoid=False)
    trained(model, digits, 400, 1e-2)
    error = float((model.reconstruct(digits) - digits).square().mean())
    print(f"linear autoencoder {error:.5f}, PCA of 6 {best(6):.5f}, of 5 {best(5):.5f}")
    assert best(6) < error < best(5)
