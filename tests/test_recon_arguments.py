"""Bad arguments of the reconstruction losses and the ELBO: the same check and text in eager and compiled."""

import math

import pytest
import torch

import vaeops

X = torch.zeros(3, 4)
WANTS = torch.zeros(3, 4, requires_grad=True)
MASK = torch.ones(3, 4, dtype=torch.bool)
loss, elbo = vaeops.recon_loss, vaeops.elbo
CASES = [
    (lambda: loss([1.0], X, "mse"), TypeError, "pred must be a tensor, got list"),
    (lambda: loss(X, 1.0, "mse"), TypeError, "target must be a tensor, got float"),
    (lambda: loss(X.long(), X, "mse"), TypeError, "pred must be float32, .* got torch.int64"),
    (
        lambda: loss(X, X.long(), "mse"),
        TypeError,
        "target must be floating point, uint8 or bool, got torch.int64",
    ),
    (
        lambda: loss(X, torch.zeros(4, 4), "mse"),
        ValueError,
        r"target \[4, 4\] does not broadcast to pred \[3, 4\]",
    ),
    (lambda: loss(X[0], X, "mse"), ValueError, r"target \[3, 4\] does not broadcast to pred \[4\]"),
    (lambda: loss(X, X.to("meta"), "mse"), ValueError, "target is on meta"),
    (lambda: loss(X, WANTS, "mse"), ValueError, r"target gets no gradient; pass target.detach\(\)"),
    (lambda: loss(X, X, "l2"), ValueError, "kind must be one of .*, got 'l2'"),
    (lambda: loss(X, X, "mse", reduction="avg"), ValueError, "reduction must be one of"),
    (
        lambda: loss(X, X, "multinomial", reduction="mean"),
        ValueError,
        "reduction must be one of .* for kind='mult",
    ),
    (lambda: loss(X, X, "mse", batch_ndim=3), ValueError, r"batch_ndim must be in \[0, 2\]"),
    (lambda: loss(X, X, "multinomial", batch_ndim=2), ValueError, r"batch_ndim must be in \[0, 1\]"),
    (lambda: loss(X, X, "mse", batch_ndim=1.0), TypeError, "batch_ndim must be an int"),
    (lambda: loss(X, X, "mse", scale=1.0), ValueError, "kind='mse' has no scale"),
    (lambda: loss(X, X, "huber", scale="1"), TypeError, "scale must be a float, got str"),
    (lambda: loss(X, X, "huber", scale=0.0), ValueError, "scale must be finite and > 0, got 0.0"),
    (lambda: loss(X, X, "laplace_nll", scale=math.nan), ValueError, "scale must be finite and > 0, got nan"),
    (lambda: loss(X, X, "mse", weight=2.0), TypeError, "weight must be None or a tensor, got float"),
    (
        lambda: loss(X, X, "mse", weight=MASK),
        TypeError,
        r"weight must be floating point \(a bool one is a mask=\)",
    ),
    (lambda: loss(X, X, "mse", mask=X), TypeError, "mask must be bool, got torch.float32"),
    (lambda: loss(X, X, "mse", mask=MASK[:2]), ValueError, r"mask \[2, 4\] does not broadcast"),
    (lambda: loss(X, X, "mse", weight=WANTS), ValueError, "weight gets no gradient"),
    (lambda: loss(X, X, "mse", impl="gpu"), ValueError, "impl must be None or one of"),
    (lambda: loss(X, X, "mse", impl="cuda"), ValueError, "impl='cuda' cannot run on cpu tensors here"),
    (lambda: elbo(X, X, 1.0, kind="mse"), TypeError, "latent must be a LatentOutput or its kl, got float"),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", reduction="dim"),
        ValueError,
        "reduction must be 'sample' or one",
    ),
    (
        lambda: elbo(X, X, X[:, 0], kind="mse"),
        ValueError,
        r"kl \[3\] and the reconstruction \[\] must have one shape",
    ),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", beta="1"),
        TypeError,
        "beta must be a float or a 0-d tensor, got str",
    ),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", beta=X),
        ValueError,
        r"beta must be a float or a 0-d tensor, got \[3",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments_under_compile(call, error, text):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=text):
        torch.compile(call, fullgraph=True, backend="eager")()
