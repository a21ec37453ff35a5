"""What the lessons print, reproduced on the fused ops."""

import pytest
import torch
from torch import nn

from vaeops.models import create

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
