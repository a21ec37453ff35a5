"""Perceptual losses: what transforms a function (compile, functorch, autocast, checkpoint), and memory."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from perceptual_case import KINDS, TAPS, gradient, images, options, relative, stored, trunk
from torch.utils.checkpoint import checkpoint

import vaeops


def loss(x, target, net=None, **kwargs):
    return vaeops.perceptual_loss(x, target, net or trunk(), **({"taps": TAPS} | kwargs))


BACKENDS = ["aot_eager", "inductor"]
SLOW_INDUCTOR = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled(f, backend, **kwargs):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend, **kwargs)


# ---- compile


@pytest.mark.parametrize("backend", SLOW_INDUCTOR)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    net = trunk().prepare(TAPS)
    f = compiled(lambda x, t: loss(x, t, net, reduction="none", kind="smooth_l1"), backend, dynamic=dynamic)
    for batch, side in ((2, 16), (3, 16), (5, 21)):
        x, target = images(batch, side, side)
        for a, b in zip(
            gradient(f, x, target), gradient(loss, x, target, reduction="none", kind="smooth_l1")
        ):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("backend", SLOW_INDUCTOR)
def test_a_prepared_trunk_is_not_packed_again(backend):
    net = vaeops.VGGTrunk("vgg11", stored("vgg11")).prepare(TAPS)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, target = images(2, 16, 16)
    torch.compile(lambda x, t: loss(x, t, net), fullgraph=True, backend=keep)(x, target)
    called = {
        str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"
    }
    assert any("perceptual_fwd" in name for name in called) and not any("vgg_pack" in name for name in called)
    new = vaeops.VGGTrunk("vgg11", stored("vgg11"), precision="bf16")
    f = compiled(lambda x, t: loss(x, t, new), backend)
    for _ in range(2):
        assert relative(gradient(f, x, target)[1], gradient(loss, x, target, new)[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_features_caches_and_targets(backend):
    net = trunk().prepare(TAPS)
    x, target = images(2, 16, 16)
    cache = net.encode(target, TAPS)

    def total(x, net=net):
        a, b, c = net.features(x, TAPS)
        return a.square().sum() + vaeops.feature_distance(b, b.flip(0), kind="gram") + c.sum()

    both = lambda x: loss(x, x * 0.5, net)  # noqa: E731
    cached = lambda x: loss(x, cache, net)  # noqa: E731
    handed = lambda x: loss(x, cache, net, return_grad=True)[1].square().sum() + x.sum()  # noqa: E731
    reversed_ = lambda x: loss(target, x, net)  # noqa: E731
    for f in (total, both, cached, handed, reversed_):
        for a, b in zip(gradient(compiled(f, backend), x), gradient(f, x)):
            assert relative(a, b) < 1e-5


def test_export_with_a_dynamic_batch():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = vaeops.VGGTrunk("vgg11", stored("vgg11")).prepare(TAPS)

        def forward(self, x, target):
            return loss(x, target, self.trunk)

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        Loss(), images(3, 16, 16), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    pair = images(5, 16, 16)
    assert relative(exported.module()(*pair), loss(*pair)) < 1e-6


# ---- torch.func


def test_functorch():
    x, target = images(3, 12, 12)
    tangent = torch.randn_like(x)
    for kind in KINDS:
        f = lambda a, kind=kind: loss(a, target, reduction="none", **options(kind))  # noqa: E731
        want = gradient(f, x)[1]
        assert relative(torch.func.grad(lambda a, f=f: f(a).sum())(x), want) < 1e-6
        got = torch.func.jvp(f, (x,), (tangent,))
        assert relative(got[0], f(x)) < 1e-6 and relative(got[1], (want * tangent).sum((1, 2, 3))) < 1e-4
    stacked = torch.stack((x, x.flip(0), -x))
    f = lambda a: loss(a, target)  # noqa: E731
    assert relative(torch.func.vmap(f)(stacked), torch.stack([f(a) for a in stacked])) < 1e-6
    each = torch.stack([gradient(f, a)[1] for a in stacked])
    assert relative(torch.func.vmap(torch.func.grad(f))(stacked), each) < 1e-6
    jacobian = torch.func.jacrev(lambda a: loss(a, target, reduction="none"))(x)
    assert jacobian.shape == (3, 3, 3, 12, 12)
    assert relative(jacobian.sum(1), gradient(loss, x, target, reduction="none")[1]) < 1e-6
    total = lambda a: sum(m.square().sum() for m in trunk().features(a, TAPS))  # noqa: E731
    assert relative(torch.func.grad(total)(x), gradient(total, x)[1]) < 1e-6


def test_vmap_and_forward_mode_of_the_distance():
    a, b = torch.randn(4, 2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    lin, t = torch.rand(3), torch.randn(2, 3, 5, 5)
    for kind in KINDS:
        f = lambda a, b, kind=kind: vaeops.feature_distance(  # noqa: E731
            a, b, kind=kind, lin=lin if kind == "lpips" else None
        )
        want = torch.stack([f(each, b) for each in a])
        assert relative(torch.func.vmap(f, (0, None))(a, b), want) < 1e-6
        got = torch.func.jvp(f, (a[0], b), (t, t * 0))[1]
        assert relative(got, (gradient(f, a[0], b)[1] * t).sum()) < 1e-4


def test_double_backward_is_an_error():
    x, target = images(1, 8, 8)
    for f in (lambda x: loss(x, target), lambda x: loss(x, x * 0.5), lambda x: loss(target, x),
              lambda x: trunk().features(x, TAPS)[0].sum()):  # fmt: skip
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="there is no double backward"):
            g.square().sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x, target = images(2, 12, 12)
    leaf = x.clone().requires_grad_()
    checkpoint(loss, leaf, target, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, gradient(loss, x, target)[1])


@pytest.mark.parametrize("bn", [None, "batch"])
def test_autocast_changes_nothing(impl, bn):
    net = trunk("vgg11_bn", bn=bn) if bn else trunk()
    x, target = images(2, 16, 16)

    def run():
        leaf = x.clone().requires_grad_()
        value = loss(leaf, target, net, impl=impl)
        maps = net.features(x, TAPS, impl=impl)
        style = vaeops.feature_distance(maps[1], maps[1] * 2, kind="gram", impl=impl)
        return value.detach(), torch.autograd.grad(value, leaf)[0], *maps, style

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(got, want):
        assert a.dtype is b.dtype and torch.equal(a, b)


def test_half_precision_images_under_autocast():
    """A decoder's bf16 output: the loss is fp32, the gradient bf16."""
    x, target = images(2, 16, 16)
    conv = torch.nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        value = loss(out, target)
    assert out.dtype is torch.bfloat16 and value.dtype is torch.float32
    value.backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


# ---- memory


def kept(f) -> list[torch.Tensor]:
    """Tensors that a graph keeps for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f()
    return saved


def test_the_gradient_is_all_that_is_kept(impl):
    x, target = images(3, 16, 16)
    x.requires_grad_()
    cache = trunk().encode(target, TAPS)
    for against in (target, cache):
        saved = [t for t in kept(lambda against=against: loss(x, against, impl=impl)) if t.numel() > 3]
        assert [t.shape for t in saved] == [x.shape]
    assert sum(t.numel() for t in kept(lambda: loss(x.detach(), target, impl=impl))) == 0
    with torch.no_grad():
        assert not kept(lambda: loss(x, target, impl=impl)) and not loss(x, target, impl=impl).requires_grad
    weights = {w.data_ptr() for w in stored("vgg11")} | {p.data_ptr() for p in trunk()._packs.values()}
    bits = [t for t in kept(lambda: trunk().features(x, TAPS, impl=impl)) if t.data_ptr() not in weights]
    size = lambda t: t.numel() * t.element_size()  # noqa: E731
    eager = kept(lambda: trunk().sequential()[:10](x * 1))
    assert 20 * sum(map(size, bits)) < sum(size(t) for t in eager if t.data_ptr() not in weights) * 3


def test_no_gradient_is_made_without_need(monkeypatch):
    from vaeops.ops.perceptual import loss as module

    wanted = []
    kernel = module._PERCEPTUAL[None]
    monkeypatch.setitem(module._PERCEPTUAL, None, lambda *args: wanted.append(args[-1]) or kernel(*args))
    x, target = images(1, 16, 16)
    loss(x, target)
    leaf = x.requires_grad_()
    with torch.no_grad():
        loss(leaf, target)
    with torch.inference_mode():
        loss(leaf, target)
    loss(leaf, target)
    assert wanted == [False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("winograd", [True, False])
def test_peak_memory_does_not_grow_with_the_batch(winograd):
    """Beyond the images and their gradient, once each of two threads has its chunk of images."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    if vaeops.info()["ops"]["perceptual_fwd"]["cpu"]["runs"] != "cpp":
        pytest.skip("no native CPU kernels")
    code = f"""
import torch, vaeops
torch.set_num_threads(2)
def high_water():
    return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
trunk = vaeops.VGGTrunk.random("vgg11", 0, winograd={winograd})
def grown(batch):
    x, t = torch.rand(batch, 3, 64, 64, requires_grad=True), torch.rand(batch, 3, 64, 64)
    vaeops.empty_cache()
    open("/proc/self/clear_refs", "w").write("5")
    before = high_water()
    vaeops.perceptual_loss(x, t, trunk, taps=("relu2_1", "relu3_2")).backward()
    return high_water() - before - 2 * x.numel() * 4
grown(32)
print(grown(32), grown(128))
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    print(f"{small / 2**20:.1f} MiB for 32 images, {large / 2**20:.1f} MiB for 128")
    assert large <= small + (8 << 20)


def test_one_trunk_serves_copies_of_a_model(impl):
    x, target = images(1, 16, 16)
    twin = copy.deepcopy(trunk())
    assert torch.equal(loss(x, target, twin, impl=impl), loss(x, target, impl=impl))
