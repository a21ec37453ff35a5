"""Perceptual losses captured as CUDA graphs: what surrounds a replay on a CPU, the replays on a GPU."""

import copy
import pickle

import pytest
import torch

from vaeops import VGGTrunk
from vaeops.nn import LPIPS, PerceptualLoss, StyleLoss

TAPS = ("relu1_1", "conv2_1", "pool2")


@pytest.fixture(scope="module")
def trunk():
    return VGGTrunk.random("vgg11", 1)


def images(count=2, height=20, width=24, dtype=torch.float32):
    x = torch.rand(count, 3, height, width, dtype=dtype) * 2 - 1
    return (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).requires_grad_(), x


def relative(ours, theirs):
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def test_a_graph_needs_cuda_tensors(trunk):
    x, target = images()
    for loss in (StyleLoss(trunk, TAPS, cuda_graph=True), LPIPS(trunk, None, taps=TAPS, cuda_graph=True)):
        with pytest.raises(ValueError, match=rf"{type(loss).__name__}: cuda_graph=True needs CUDA tensors"):
            loss(x, target)
        assert type(copy.deepcopy(loss).captured) is type(pickle.loads(pickle.dumps(loss)).captured)
    with pytest.raises(ValueError, match="not for per_layer=True"):
        loss(x, target, per_layer=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_surrounds_a_replay(trunk, reduction):
    """With a graph that only calls: values, the gradient of either image, of a cache, and of fp16."""

    @torch.no_grad()
    def call(key, function, *inputs):
        hash(key)
        return [t.clone() for t in function(*(t.clone() for t in inputs))]

    loss, (x, target) = PerceptualLoss(trunk, taps=TAPS, reduction=reduction), images()
    for a, b in ((x, target), (target, x), (x, loss.encode(target)), (x.detach(), target)):
        found, wanted = loss._replayed(call, a, b, reduction), loss(a, b)
        assert relative(found, wanted) < 1e-6 and found.requires_grad == wanted.requires_grad
        if found.requires_grad:
            one, other = (torch.autograd.grad(v, x, torch.ones_like(v) * 3, create_graph=True)[0]
                          for v in (found, wanted))  # fmt: skip
            assert relative(one, other) < 1e-6
            with pytest.raises(RuntimeError, match="there is no double backward"):
                one.sum().backward()
    half = x.detach().half().requires_grad_()
    one, other = (torch.autograd.grad(v.sum() * 2.0**10, half)[0]
                  for v in (loss._replayed(call, half, target, reduction), loss(half, target)))  # fmt: skip
    assert one.dtype is torch.float16 and relative(one.float(), other.float()) < 1e-3
    with pytest.raises(ValueError, match="to x or to the target, not to both"):
        loss._replayed(call, x, x * 1, reduction)


@pytest.mark.gpu
def test_replays_are_the_same_bits_and_nothing_else_is_captured():
    trunk = VGGTrunk.random("vgg16", 1).cuda()
    for make in (PerceptualLoss, StyleLoss, lambda t, **o: LPIPS(t, None, **o)):
        loss, graph = make(trunk), make(trunk, cuda_graph=True)
        for count in (2, 3, 2, 2):
            x, target = (t.detach().cuda() for t in images(count))
            x.requires_grad_()
            for to in (target, loss.encode(target)):
                one, other = loss(x, to), graph(x, to)
                assert torch.equal(one, other)
                found, wanted = (torch.autograd.grad(3 * v.sum(), x)[0] for v in (other, one))
                assert torch.equal(found, wanted)
            with torch.no_grad():
                assert torch.equal(graph(x, target), loss(x, target)) and not graph(x, target).requires_grad
            (turned,) = torch.autograd.grad(graph(target, x).sum(), x)
            assert relative(turned, wanted / 3) < 1e-5
        assert (
            len(graph.captured._captures) == 8
        )  # of the 3 kinds of call above, for 2 counts, and turned round
        held = graph(x, target).detach()
        value = held.clone()
        graph(x * 0.5, target)
        assert torch.equal(held, value)  # results are not the graph's own memory
        with pytest.raises(ValueError, match="to x or to the target, not to both"):
            graph(x, target.requires_grad_())
        torch._dynamo.reset()
        compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, target.detach()), loss(x, target.detach()))
        assert not copy.deepcopy(graph).captured._captures


@pytest.mark.gpu
def test_a_trunk_that_moves_is_captured_anew():
    trunk = VGGTrunk.random("vgg16", 1).cuda()
    graph = PerceptualLoss(trunk, cuda_graph=True)
    x, target = (t.detach().cuda() for t in images())
    before = graph(x, target)
    trunk.cpu()
    trunk.cuda()
    assert torch.equal(graph(x, target), before)
