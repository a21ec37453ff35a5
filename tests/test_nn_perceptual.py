"""Perceptual losses as layers: against formulas spelt out; their life in a model."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import vaeops
from bench import peers
from vaeops import Term, VGGTrunk
from vaeops.nn import LPIPS, PerceptualLoss, StyleLoss
from vaeops.ref.perceptual import tap_codes

TAPS = ("relu1_1", "conv2_1", "pool2")
FLIPS = 1e-2  # a ReLU that rounding flips moves the gradient of a small image by about 2e-3


@pytest.fixture(scope="module")
def trunk():
    return VGGTrunk.random("vgg11", 1)


@pytest.fixture(scope="module")
def vgg16():
    return VGGTrunk.random("vgg16", 1)


def images(count=2, height=20, width=24, dtype=torch.float32):
    x = torch.rand(count, 3, height, width, dtype=dtype) * 2 - 1
    return (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).requires_grad_(), x


def relative(ours, theirs):
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def normalized(x):
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((x + 1) / 2 - mean) / std


def maps_of(features, x, indices):
    """What hooks on a net without in-place ReLUs see."""
    found = []
    for i, layer in enumerate(features[: indices[-1] + 1]):
        x = layer(x)
        if i in indices:
            found.append(x)
    return found


def plain(sequential):
    for layer in sequential:
        layer.inplace = False
    return sequential


# ---- losses


DISTANCES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "gram": lambda a, b, reduction: F.mse_loss(gram(a), gram(b), reduction=reduction),
}


def gram(x):
    return torch.einsum("bihw,bjhw->bij", x, x) / x[0].numel()


def spelt_out(trunk, x, target, kind, taps, weights, reduction):
    """Per image, from the maps of the net in PyTorch."""
    features = plain(trunk.sequential())
    indices = [next(i for i, c in tap_codes(trunk.arch).items() if isinstance(i, int) and c == tap)
               for tap in trunk.cut(taps).taps]  # fmt: skip
    ours, theirs = (maps_of(features, normalized(image), indices) for image in (x, target))
    each = "sum" if reduction == "sum" else "mean"
    losses = [sum(w * DISTANCES[kind](a[i : i + 1], b[i : i + 1], reduction=each)
                  for w, a, b in zip(weights, ours, theirs)) for i in range(len(x))]  # fmt: skip
    losses = torch.stack(losses)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", DISTANCES)
def test_formula(trunk, kind, reduction, dtype):
    net, (x, target) = copy.deepcopy(trunk).to(dtype), images(dtype=dtype)
    weights = (1.0, 0.5, 2.0)
    if kind == "gram":
        loss = StyleLoss(net, TAPS, weights=weights, reduction=reduction)
    else:
        loss = PerceptualLoss(net, taps=TAPS, kind=kind, weights=weights, reduction=reduction)
    found, wanted = loss(x, target), spelt_out(net, x, target, kind, TAPS, weights, reduction)
    exact = dtype is torch.float64
    assert found.shape == wanted.shape and relative(found, wanted) < (1e-12 if exact else 1e-5)
    cotangent = (
        torch.linspace(-1, 2, 2, dtype=dtype) if reduction == "none" else torch.tensor(3.0, dtype=dtype)
    )
    one, other = (torch.autograd.grad(v, x, cotangent)[0] for v in (found, wanted))
    assert relative(one, other) < (1e-10 if exact else FLIPS)
    assert torch.equal(loss(x, loss.encode(target)), found)


def test_defaults(vgg16):
    x, target = images()
    found = PerceptualLoss(vgg16)(x, target)
    assert torch.equal(found, vaeops.perceptual_loss(x, target, vgg16))
    taps = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    wanted = vaeops.perceptual_loss(x, target, vgg16, taps=taps, kind="gram")
    assert torch.equal(StyleLoss(vgg16)(x, target), wanted)


def test_several_losses_from_one_run(trunk):
    """Encoding takes the taps of all, each once and in order, whatever the order of the terms."""
    x, target = images()
    style, content = Term("gram", ("relu1_1", "relu3_1"), weight=3.0), Term("l1", ("conv2_1", "relu3_1"))
    loss = PerceptualLoss(trunk, terms=[style, content])
    assert loss.taps == ("relu1_1", "conv2_1", "relu3_1")
    wanted = 3 * StyleLoss(trunk, style.taps)(x, target) + PerceptualLoss(
        trunk, taps=content.taps, kind="l1"
    )(x, target)
    torch.testing.assert_close(loss(x, target), wanted)
    assert torch.equal(loss(x, loss.encode(target)), loss(x, target))


def lpips_parts(trunk, x, target, lin, size=None):
    features = plain(trunk.sequential())
    maps = (maps_of(features, normalized(image), [3, 8, 15, 22, 29]) for image in (x, target))
    parts = []
    for a, b, w in zip(*maps, lin):
        a, b = (m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in (a, b))
        d = (w.view(-1, 1, 1) * (a - b).square()).sum(1, keepdim=True)
        parts.append(d.mean((1, 2, 3)) if size is None else F.interpolate(d, size, mode="bilinear"))
    return parts


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("spatial", [False, True])
def test_lpips_formula(vgg16, spatial, reduction):
    x, target = images()
    lin = [torch.rand(c) for c in (64, 128, 256, 512, 512)]
    loss = LPIPS(vgg16, lin, spatial=spatial, reduction=reduction)
    wanted = lpips_parts(vgg16, x, target, lin, x.shape[2:] if spatial else None)
    reduce = {"none": lambda v: v, "mean": torch.mean, "sum": torch.sum}[reduction]
    value, parts = loss(x, target, per_layer=True)
    for one, other in zip(parts, map(reduce, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for found in (value, loss(x, target), loss(x, loss.encode(target))):
        assert relative(found, reduce(sum(wanted))) < 1e-5
    one, other = (torch.autograd.grad(v.square().sum(), x)[0] for v in (loss(x, target), reduce(sum(wanted))))
    assert relative(one, other) < FLIPS


def test_lpips_without_linear_layers(vgg16):
    x, target = images()
    ones = [torch.ones(c) for c in (64, 128, 256, 512, 512)]
    assert torch.equal(LPIPS(vgg16, None)(x, target), LPIPS(vgg16, ones)(x, target))


def test_lpips_reads_the_packages_files(vgg16):
    try:
        loss = LPIPS(vgg16)
    except ValueError as error:
        assert "which is not installed" in str(error)
        pytest.skip("lpips is not installed")
    assert "lpips" not in sys.modules or peers.lpips.cache_info().currsize
    assert [len(w) for w in loss.terms[0].lin] == [64, 128, 256, 512, 512]
    assert all(w.min() >= 0 and w.max() > 0 for w in loss.terms[0].lin)
    with pytest.raises(ValueError, match=r"version 0\.0 needs a trunk with normalize=None and input_range"):
        LPIPS(vgg16, "0.0")
    raw = VGGTrunk(vgg16.arch, vgg16._weights, normalize=None)
    assert not torch.equal(LPIPS(raw, "0.0").terms[0].lin[0], loss.terms[0].lin[0])
    with pytest.raises(ValueError, match=r"version 0\.1 needs a trunk with normalize='imagenet'.*=None"):
        LPIPS(raw)


# ---- how they live


def losses(trunk, vgg16):
    lin = [torch.rand(c) for c in (64, 128, 256, 512, 512)]
    terms = [Term("mse", ["relu2_1"]), Term("lpips", ["relu1_1"], lin=lin[:1])]
    return [PerceptualLoss(trunk, taps=TAPS), StyleLoss(trunk, TAPS), LPIPS(vgg16, lin, reduction="mean"),
            PerceptualLoss(vgg16, terms=terms)]  # fmt: skip


def test_nothing_to_train_to_save_or_to_broadcast(trunk, vgg16):
    for loss in losses(trunk, vgg16):
        model = nn.ModuleDict({"loss": loss})
        assert not list(model.parameters()) and not list(model.buffers()) and not model.state_dict()
        x, target = images()
        before = loss(x, target)
        assert torch.equal(model.train()["loss"](x, target), before)
        assert torch.equal(model.half().bfloat16()["loss"](x, target), before)


def test_copies_share_the_trunk(trunk, vgg16):
    x, target = images()

    def where(loss):
        return [w.data_ptr() for w in loss.trunk.cut(loss.taps).weights]

    for loss in losses(trunk, vgg16):
        twin = copy.deepcopy(loss)
        assert torch.equal(twin(x, target), loss(x, target)) and where(twin) == where(loss)
    loss = LPIPS(trunk, None, taps=TAPS)
    again = pickle.loads(pickle.dumps(loss))
    assert torch.equal(again(x, target), loss(x, target)) and where(again) != where(loss)


def test_double_moves_all_of_it():
    vgg16, (x, target) = VGGTrunk.random("vgg16", 1), images(dtype=torch.float64)
    lin = [torch.rand(c) for c in (64, 128, 256, 512, 512)]
    loss = LPIPS(vgg16, lin).double()
    assert loss.terms[0].lin[0].dtype is torch.float64
    found, wanted = loss(x, target), sum(lpips_parts(vgg16, x, target, lin))
    assert found.dtype is torch.float64 and relative(found, wanted) < 1e-12
    assert relative(*(torch.autograd.grad(v.sum(), x)[0] for v in (found, wanted))) < 1e-10


def test_under_autocast_the_same(trunk, vgg16):
    for loss in losses(trunk, vgg16):
        x, target = images()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(x, target)
        assert found.dtype is torch.float32 and torch.equal(found, loss(x, target))


def test_a_decoder_in_bf16_trains(trunk):
    """What reaches the decoder is a gradient in its own dtype."""
    loss, (_, target) = PerceptualLoss(trunk, taps=TAPS), images()
    x = target.bfloat16().requires_grad_()
    loss(x + 0.1, target).backward()
    assert x.grad.dtype is torch.bfloat16 and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(trunk, backend):
    """What the functions of the layers do when compiled: test_perceptual_transforms.py."""
    torch._dynamo.reset()
    terms = [Term("gram", ["relu1_1"]), Term("lpips", ["relu2_1"], lin=[torch.rand(128)])]
    for loss in (PerceptualLoss(trunk, terms=terms), LPIPS(trunk, None, taps=TAPS, reduction="mean")):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        for count, cached in ((2, False), (2, True), (3, False)):
            x, target = images(count, 8, 8)
            to = loss.encode(target) if cached else target
            one, other = compiled(x, to), loss(x, to)
            torch.testing.assert_close(one, other)
            found, wanted = (torch.autograd.grad(v, x)[0] for v in (one, other))
            assert relative(found, wanted) < 1e-5


def test_checkpointing(trunk):
    loss, (x, target) = PerceptualLoss(trunk, taps=TAPS), images()
    (wanted,) = torch.autograd.grad(loss(x, target), x)
    value = torch.utils.checkpoint.checkpoint(loss, x, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, x)[0], wanted)


TERM, MIXING = Term("mse", TAPS), VGGTrunk.random("vgg11_bn", 0, bn="batch")
BAD_OPTIONS = [
    (lambda t: PerceptualLoss(t, taps="relu2_1"), TypeError, "taps must be a sequence"),
    (lambda t: PerceptualLoss(t, taps=("relu3_1", "relu2_1")), ValueError, "taps must be in the net's order"),
    (lambda t: PerceptualLoss(t, taps=("relu9_1",)), ValueError, "vgg11 has no 'relu9_1'"),
    (lambda t: LPIPS(t, [torch.ones(3)]), ValueError, "vgg11 has no 'relu1_2'"),
    (lambda t: LPIPS(t, None, taps=TAPS, reduction="batch"), ValueError, "LPIPS: reduction must be one of"),
    (lambda t: LPIPS(t, None, taps=TAPS, spatial=True, cuda_graph=True), ValueError, "not for spatial=True"),
    (lambda t: LPIPS(t, "nowhere.pth", taps=TAPS), FileNotFoundError, "nowhere.pth"),
    (lambda t: PerceptualLoss(t, taps=TAPS, terms=[TERM]), ValueError, "^PerceptualLoss: terms bring their"),
    (lambda t: PerceptualLoss(t, terms=TERM), TypeError, "^PerceptualLoss: terms must be a list"),
    (lambda t: StyleLoss("vgg11"), TypeError, "^StyleLoss: trunk must be a vaeops.VGGTrunk, got str"),
    (lambda t: LPIPS(None), TypeError, "^LPIPS: trunk must be a vaeops.VGGTrunk, got NoneType"),
    (lambda t: LPIPS(MIXING, None, taps=TAPS), ValueError, "^LPIPS: trunk: bn='batch' mixes the images"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_OPTIONS)
def test_bad_options(trunk, make, error, message):
    with pytest.raises(error, match=message):
        make(trunk)


# ---- several processes


class Decoder(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.loss = PerceptualLoss(VGGTrunk.random("vgg11", seed), taps=TAPS)

    def forward(self, z, target):
        return self.loss(self.net(z).tanh(), target)


def worker(rank, world, path):
    """Trunks start unlike on purpose: a broadcast would make them equal."""
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", world_size=world, rank=rank)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = Decoder(seed=rank)
    before = model.loss.trunk.checksum
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        z, target = images()
        wrapped(z, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    del model.loss.trunk.__dict__["checksum"]
    torch.save((before, model.loss.trunk.checksum, model.state_dict()), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # that there is nothing to broadcast is tested above
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_data_parallel_broadcasts_no_trunk(tmp_path):
    here = Path(__file__).resolve()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here.parent)]),
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    code = "import sys, test_nn_perceptual as t; t.worker(int(sys.argv[1]), 2, sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(r), str(tmp_path)], env=env,
                              stderr=subprocess.PIPE, text=True) for r in range(2)]  # fmt: skip
    errors = [r.communicate(timeout=240)[1] for r in ranks]
    assert not any(r.returncode for r in ranks), "\n".join(errors)
    results = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for before, after, state in results:
        assert before == after and set(state) == {"net.weight", "net.bias"}
    assert results[0][0] != results[1][0]
    for name, weight in results[0][2].items():
        assert torch.equal(weight, results[1][2][name])
