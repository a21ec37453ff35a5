"""The workshop's perceptual loss against a literal copy of what its notebook does: hooks on a whole VGG16."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vaeops import VGGTrunk
from vaeops.compat.workshop import HookPerceptualLoss

FLIPS = 1e-2  # a ReLU that rounding flips moves the gradient of a small image by about 2e-3


class Hooks:
    """The notebook's way: `features` as it comes out of the constructor, in training mode."""

    def __init__(self, features, indices, training=True):
        self.features, self.found = features.train(training), {}
        for i in indices:
            features[i].register_forward_hook(lambda _, __, output, i=i: self.found.update({i: output}))

    def maps(self, image):
        self.features(image)
        return list(self.found.values())

    def __call__(self, x_recon, x, reduction="sum"):
        found = [m.clone() for m in self.maps(x_recon)]
        with torch.no_grad():
            wanted = [m.clone() for m in self.maps(x)]
        return sum(F.mse_loss(a, b, reduction=reduction) for a, b in zip(found, wanted))


def trunk(arch="vgg16_bn", bn="batch"):
    return VGGTrunk.random(arch, 5, bn=bn if arch.endswith("_bn") else None, normalize=None)


def images(count=4, size=32, dtype=torch.float32):
    x = torch.rand(count, 3, size, size, dtype=dtype) * 2 - 1
    return (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).requires_grad_(), x


def relative(ours, theirs):
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


@pytest.mark.parametrize("indices", [(5, 15), (4, 9, 16), (6, 22)], ids=str)
@pytest.mark.parametrize("bn", ["batch", "eval"])
def test_literally_the_workshops(bn, indices):
    net = trunk(bn={"batch": "batch", "eval": "fold"}[bn])
    theirs, ours = (
        Hooks(net.sequential(), indices, bn == "batch"),
        HookPerceptualLoss(indices=indices, bn=bn, trunk=net),
    )
    x_recon, x = images()
    for reduction in ("sum", "mean"):
        ours.reduction = reduction
        found, wanted = ours(x_recon, x), theirs(x_recon, x, reduction)
        assert found.shape == () and relative(found, wanted) < 1e-5
        one, other = (torch.autograd.grad(3 * loss, x_recon)[0] for loss in (found, wanted))
        assert relative(one, other) < FLIPS


@pytest.mark.parametrize("bn", ["batch", "eval"])
def test_in_double_precision_to_the_last_digits(bn):
    net = trunk(bn={"batch": "batch", "eval": "fold"}[bn]).double()
    theirs, ours = Hooks(net.sequential(), (5, 15), bn == "batch"), HookPerceptualLoss(bn=bn, trunk=net)
    x_recon, x = images(dtype=torch.float64)
    found, wanted = ours(x_recon, x), theirs(x_recon, x)
    # Folded weights are rounded to fp32 once.
    assert relative(found, wanted) < (1e-12 if bn == "batch" else 1e-6)
    one, other = (torch.autograd.grad(loss, x_recon)[0] for loss in (found, wanted))
    assert relative(one, other) < (1e-10 if bn == "batch" else 1e-3)


@pytest.mark.parametrize("indices", [(5, 15), (2, 14, 29)], ids=str)
def test_without_batch_norm(indices):
    """In a plain VGG16 index 5 is conv2_1, hence relu2_1; 15 is relu3_3."""
    net = trunk("vgg16")
    theirs, ours = Hooks(net.sequential(), indices), HookPerceptualLoss("vgg16", indices, trunk=net)
    x_recon, x = images()
    found, wanted = ours(x_recon, x), theirs(x_recon, x)
    assert relative(found, wanted) < 1e-5
    assert relative(*(torch.autograd.grad(loss, x_recon)[0] for loss in (found, wanted))) < FLIPS


def test_the_relu_in_place_moves_the_tap():
    net = trunk(bn="fold")
    x_recon, x = images()
    moved, intended = (HookPerceptualLoss(bn="eval", in_place=p, trunk=net) for p in (True, False))
    assert net.cut(moved.taps).taps == net.cut(["relu1_2", "relu3_1"]).taps
    assert net.cut(intended.taps).taps == net.cut(["relu1_2", "conv3_1"]).taps
    features = net.sequential()
    for layer in features:
        layer.inplace = False
    assert relative(intended(x_recon, x), Hooks(features, (5, 15), training=False)(x_recon, x)) < 1e-5
    assert relative(intended(x_recon, x), moved(x_recon, x)) > 0.1


def test_batch_statistics_mix_the_images():
    net, contrast = trunk(), torch.logspace(-1, 0, 4).view(-1, 1, 1, 1)
    x_recon, x = (contrast * image for image in images())
    ours = HookPerceptualLoss(trunk=net)
    apart = sum(ours(x_recon[i : i + 2], x[i : i + 2]) for i in (0, 2))
    assert relative(apart, ours(x_recon, x)) > 1e-3
    alone = HookPerceptualLoss(bn="eval", trunk=trunk(bn="fold"))
    apart = sum(alone(x_recon[i : i + 2], x[i : i + 2]) for i in (0, 2))
    assert relative(apart, alone(x_recon, x)) < 1e-6


def test_running_statistics_drift_in_the_hooked_net_and_not_here():
    net, (x_recon, x) = trunk(), images()
    theirs, ours = Hooks(net.sequential(), (5, 15)), HookPerceptualLoss(trunk=net)
    before = theirs.features[1].running_mean.clone()
    theirs(x_recon, x)
    assert not torch.equal(theirs.features[1].running_mean, before)
    first = ours(x_recon, x)
    assert torch.equal(ours(x_recon, x), first)
    assert torch.equal(net.sequential()[1].running_mean, before)


@pytest.mark.parametrize(("count", "height", "width"), [(1, 33, 30), (3, 8, 9), (2, 4, 5)])
def test_sizes_that_no_pool_divides(count, height, width):
    net, indices = trunk(), (5, 9, 15)
    ours = HookPerceptualLoss(indices=indices, trunk=net)
    theirs, exact = (Hooks(net.sequential()[:17].to(t), indices) for t in (torch.float32, torch.float64))
    x = torch.rand(count, 3, height, width) * 2 - 1
    x_recon = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    double = x_recon.detach().double().requires_grad_()
    values = [ours(x_recon, x), theirs(x_recon, x), exact(double, x.double())]
    found, literal, want = (
        torch.autograd.grad(v, leaf)[0] for v, leaf in zip(values, (x_recon, x_recon, double))
    )
    assert relative(values[0], values[2]) < 3 * relative(values[1], values[2]) + 1e-6
    assert relative(found, want) < 3 * relative(literal, want) + 2e-3


def test_the_same_bits_on_any_number_of_threads():
    ours, (x_recon, x) = HookPerceptualLoss(trunk=trunk()), images()
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = ours(x_recon, x)
        found.append((loss.detach(), *torch.autograd.grad(loss, x_recon)))
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_one_value_has_no_variance():
    """As PyTorch's batch norm has it."""
    net, x = trunk(), torch.rand(1, 3, 4, 7)
    theirs, ours = Hooks(net.sequential()[:17], (5, 15)), HookPerceptualLoss(trunk=net)
    for run in (theirs.maps, ours.encode, lambda x: ours(x, x)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            run(x)
    assert ours(x.expand(2, -1, -1, -1), x.expand(2, -1, -1, -1)) == 0


@pytest.mark.parametrize("bn", ["batch", "eval"])
def test_cached_target_and_gradient_of_the_target(bn):
    net = trunk(bn={"batch": "batch", "eval": "fold"}[bn])
    ours, (x_recon, x) = HookPerceptualLoss(bn=bn, trunk=net), images()
    assert torch.equal(ours(x_recon, ours.encode(x)), ours(x_recon, x))
    x.requires_grad_()
    both = torch.autograd.grad(ours(x_recon, x), (x_recon, x))
    turned = torch.autograd.grad(ours(x, x_recon), (x_recon, x))
    for one, other in zip(both, turned):
        assert relative(one, other) < 1e-5


def test_from_weights_and_files(tmp_path):
    net, (x_recon, x) = trunk(bn="fold"), images()
    state = {f"features.{k}": v for k, v in net.sequential().state_dict().items()}
    torch.save(state, tmp_path / "vgg16_bn.pth")
    want = HookPerceptualLoss(trunk=trunk())(x_recon, x)
    for given in (state, tmp_path / "vgg16_bn.pth"):
        assert torch.equal(HookPerceptualLoss(trunk=given)(x_recon, x), want)


def test_a_parent_in_training_changes_nothing():
    ours, (x_recon, x) = HookPerceptualLoss(bn="eval", trunk=trunk(bn="fold")), images()
    before = ours(x_recon, x)
    assert torch.equal(copy.deepcopy(ours).train()(x_recon, x), before)
    assert torch.equal(ours.train()(x_recon, x), before)
    assert not list(ours.parameters()) and not ours.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bn": "train"}, r"bn must be one of \('batch', 'eval'\), got 'train'"),
        ({"reduction": "none"}, "reduction must be 'sum' or 'mean', got 'none'"),
        ({"bn": "eval"}, "needs a trunk of it with bn='fold', got 'vgg16_bn' with bn='batch'"),
        ({"arch": "vgg16"}, "arch 'vgg16' .*got 'vgg16_bn'"),
        ({"indices": (15, 5)}, "order"),
        ({"indices": (44,)}, "44"),
        ({"indices": (0,)}, "before its batch norm"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HookPerceptualLoss(**{"trunk": trunk(), **options})
