"""The diffusion model: its schedules, the forward process, ancestral sampling, training."""

import math

import model_case as case
import pytest
import torch

from vaeops import rng
from vaeops.models import TinyDDPM, create
from vaeops.models.diffusion import SCHEDULES, alpha_bar


def small(**options):
    return TinyDDPM(1, 8, 10, width=8, **options)


def awake(model):
    """The last convolution starts at 0: let the output depend on the input."""
    torch.nn.init.normal_(model.unet.out[-1].weight, std=0.1)
    return model


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [({}, 493_089), ({"side": 8}, 493_089), ({"channels": 3, "side": 12}, 494_243)],
)
def test_parameter_counts_and_sizes(overrides, parameters):
    model = create("ddpm-tiny", **overrides)
    assert case.count(model) == parameters
    x = torch.rand(2, *model.input_shape) * 2 - 1
    assert model.unet(x, torch.tensor([0, 49])).shape == x.shape


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    a = alpha_bar(schedule, 50)
    assert a.shape == (50,) and 0.97 < a[0] < 1 and 0 < a[-1] < 0.01 and (a.diff() < 0).all()
    if schedule == "cosine":
        s = torch.arange(1, 51, dtype=torch.float64) / 50
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(a[:-1], f[:-1].float())  # the last step is limited
    else:
        beta = torch.linspace(0.002, 0.4, 50, dtype=torch.float64)
        torch.testing.assert_close(a, (1 - beta).cumprod(0).float())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_of_the_forward_process(schedule):
    model = TinyDDPM(1, 8, 50, width=8, schedule=schedule)
    n, level = 4000, 0.6
    x = torch.full((n, 1, 8, 8), level)
    for t in (0, 20, 49):
        noisy = model.add_noise(x, torch.full((n,), t), rng.normal(x.shape, rng.fold_in(case.SEED, t)))
        a, samples = float(model.alpha_bar[t]), noisy.numel()
        mean, variance = float(noisy.mean()), float(noisy.var())
        assert mean == pytest.approx(math.sqrt(a) * level, abs=5 * math.sqrt((1 - a) / samples))
        assert variance == pytest.approx(1 - a, rel=5 * math.sqrt(2 / samples))


def test_steps_are_drawn_evenly():
    model, seen = small(), []
    model.unet.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.terms(torch.zeros(4000, 1, 8, 8), seed=case.SEED)
    counts = torch.bincount(seen[0], minlength=10)
    assert len(counts) == 10 and ((counts - 400).abs() < 5 * math.sqrt(4000 * 0.1 * 0.9)).all()


def test_loss_of_a_net_that_says_nothing_is_the_noise_itself():
    model, x = small(), torch.zeros(4, 1, 8, 8)
    eps = torch.randn(x.shape)
    losses, monitors = model.terms(x, seed=case.SEED, eps=eps)
    torch.testing.assert_close(losses["noise_mse"], eps.square().mean())
    assert list(losses) == list(model.weights) and not monitors
    assert model.terms(x).losses["noise_mse"] != model.terms(x).losses["noise_mse"]  # fresh seeds


def test_rows_draw_the_joined_noise():
    case.assert_rows_draw_the_joined_noise(awake(small()), torch.rand(6, 1, 8, 8))


def test_training_agrees_with_the_reference():
    case.assert_ops_agree(small, torch.rand(4, 1, 8, 8))


def test_one_graph_and_fp32_losses(tmp_path):
    model = awake(create("ddpm-tiny", side=8, width=8))
    case.assert_traces_and_autocasts(model, torch.rand(4, 1, 8, 8))
    case.assert_survives_its_file(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_denoising_with_the_right_answer(schedule):
    """A net that knows the image leads every draw to it; each step then has q(x_{t-1} | x)'s moments."""
    model = TinyDDPM(1, 8, 50, width=8, schedule=schedule)
    level = 0.4

    def oracle(x, t):
        a = model.alpha_bar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * level) / (1 - a).sqrt()

    del model.unet
    model.unet = oracle
    trail = list(model.denoise(500, case.SEED))
    assert len(trail) == 51
    assert torch.equal(trail[-1], model.sample(500, case.SEED))
    torch.testing.assert_close(trail[-1], torch.full_like(trail[-1], level), rtol=0, atol=1e-4)
    samples = trail[0].numel()
    for t in (10, 30, 45):
        x, a = trail[-2 - t], float(model.alpha_bar[t])
        assert float(x.mean()) == pytest.approx(math.sqrt(a) * level, abs=5 * math.sqrt((1 - a) / samples))
        assert float(x.var()) == pytest.approx(1 - a, rel=5 * math.sqrt(2 / samples))


def test_samples():
    model = awake(small())
    x = model.sample(3, case.SEED)
    assert x.shape == (3, 1, 8, 8) and x.min() >= -1 and x.max() <= 1 and not x.requires_grad
    assert torch.equal(x, model.sample(3, case.SEED)) and not torch.equal(x, model.sample(3, case.SEED + 1))
    torch.testing.assert_close(model.sample(2, case.SEED), x[:2])


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 8, 8\], got \[2, 1, 8, 4\]"):
        small().terms(torch.zeros(2, 1, 8, 4))
    for options, message in (
        ({"side": 10}, "side must be a positive multiple of 4, got 10"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"width": 12}, "width must be a positive multiple of 8, got 12"),
        ({"schedule": "sigmoid"}, r"schedule must be one of .* got 'sigmoid'"),
        ({"ops": "eager"}, r"ops must be one of .* got 'eager'"),
    ):
        with pytest.raises(ValueError, match=message):
            TinyDDPM(**options)


@pytest.mark.slow
def test_training_on_digits():
    images, _ = case.digits()
    torch.manual_seed(0)
    x = images * 2 - 1
    model = TinyDDPM(1, 8, width=16)
    history = case.train(model, case.drawer(x), 400, lr=2e-3)
    first, last = (case.mean_of(history, "noise_mse", part) for part in (slice(1), slice(-50, None)))
    made = model.eval().sample(200, case.SEED)
    print("noise_mse", first, last, "mean", float(made.mean()), float(x.mean()))
    assert last < 0.35 * first
    assert (made.mean(0) - x.mean(0)).abs().mean() < 0.15
