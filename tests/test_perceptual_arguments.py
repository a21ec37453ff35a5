"""Perceptual losses: bad arguments, each named in the error, in eager mode and under torch.compile."""

import pytest
import torch
from perceptual_case import TAPS, images, linear, trunk

import vaeops
from vaeops import TargetCache, Term

X, TARGET = images(2, 16, 16)
LIN, TRUNK = linear(), trunk()


def cache(taps=TAPS, images=TARGET):
    return trunk().encode(images, taps)


# (what is changed, error, its text)
LOSS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be float32, bfloat16, float16, float64 or uint8, got torch.int64"),
    ({"x": X[:, :2]}, ValueError, r"x must have shape \[B, 3, H, W\], got \[2, 2, 16, 16\]"),
    ({"x": X[0]}, ValueError, r"x must have shape \[B, 3, H, W\], got \[3, 16, 16\]"),
    ({"target": "moon"}, TypeError, "target must be an image or a TargetCache, got str"),
    ({"target": TARGET[:1]}, ValueError, r"target must have x's shape \[2, 3, 16, 16\], got \[1, 3, 16, 16"),
    ({"target": TARGET[..., :8]}, ValueError, r"target must have x's shape .* got \[2, 3, 16, 8\]"),
    ({"target": TARGET.int()}, TypeError, "target must be float32.*got torch.int32"),
    ({"target": TARGET.to("meta")}, ValueError, "target is on meta, it must be on x's device cpu"),
    ({"target": cache()[:1]}, ValueError, r"target holds a map \[1, 64, 16, 16\] where x has \[2, 64,"),
    ({"target": cache(images=TARGET[..., :8])}, ValueError, r"target holds a map \[2, 64, 16, 8\]"),
    ({"target": cache(TAPS[:2])}, ValueError, "target was encoded at .*, relu3_2 is missing"),
    ({"target": cache().to(torch.float16)}, TypeError, "target's maps must be float32 or bfloat16"),
    ({"target": cache().to("meta")}, ValueError, "target is on meta"),
    ({"trunk": None}, TypeError, "trunk must be a vaeops.VGGTrunk, got NoneType"),
    ({"x": X.to("meta"), "target": TARGET.to("meta")}, ValueError, "trunk is on cpu, it must be on x's"),
    ({"taps": "relu1_1"}, TypeError, "taps must be a sequence"),
    ({"taps": ()}, TypeError, "taps must be a sequence of at least one"),
    ({"taps": (1.5,)}, TypeError, "taps must hold names and indices, got 1.5"),
    ({"taps": (True,)}, TypeError, "taps must hold names and indices, got True"),
    ({"taps": ("relu9_1",)}, ValueError, "vgg11 has no 'relu9_1'; it has conv1_1, relu1_1, pool1"),
    ({"taps": ("relu1_2",)}, ValueError, "vgg11 has no 'relu1_2'"),
    ({"taps": (21,)}, ValueError, "vgg11 has no 21; .* the indices 0 to 20"),
    ({"taps": (-1,)}, ValueError, "vgg11 has no -1"),
    ({"taps": ("relu2_1", "relu1_1")}, ValueError, "taps must be in the net's order, each once"),
    ({"taps": ("relu2_1", 4)}, ValueError, "taps must be in the net's order, each once"),
    ({"taps": ("pool5",)}, ValueError, r"x is 16 x 16 pixels, the deepest tap \(5 pools\) needs at least 32"),
    ({"kind": "l2"}, ValueError, r"kind must be one of \('mse', .* got 'l2'"),
    ({"weights": 1.0}, TypeError, "weights must be None or a number for each tap, got float"),
    ({"weights": (1.0, 2.0)}, ValueError, "weights must hold a number for each of the 3 taps, got 2"),
    ({"weights": (1.0, "a", 2.0)}, TypeError, "weights must be a float, got str"),
    ({"weights": (1.0, float("inf"), 2.0)}, ValueError, "weights must be finite, got inf"),
    ({"lin": LIN}, ValueError, "lin is for kind='lpips', got kind='mse'"),
    ({"kind": "lpips"}, TypeError, "lin must be a list of one tensor .* got NoneType"),
    ({"kind": "lpips", "lin": LIN[:2]}, ValueError, "lin must hold a tensor for each of 3 taps, got 2"),
    ({"kind": "lpips", "lin": [1.0] * 3}, TypeError, "lin must hold tensors, got float"),
    ({"kind": "lpips", "lin": LIN[::-1]}, ValueError, r"lin must have shape \[64\] at this tap, got \[256\]"),
    ({"kind": "lpips", "lin": [w.long() for w in LIN]}, TypeError, "lin must be floating point"),
    ({"kind": "lpips", "lin": [w.to("meta") for w in LIN]}, ValueError, "lin is on meta"),
    ({"kind": "lpips", "lin": [w.clone().requires_grad_() for w in LIN]}, ValueError, "lin gets no gradient"),
    ({"terms": []}, TypeError, "terms must be a list of at least one vaeops.Term"),
    ({"terms": [("mse", TAPS)]}, TypeError, "terms must be a list of at least one vaeops.Term"),
    ({"terms": [Term("mse", TAPS)], "kind": "l1"}, ValueError, "terms bring their own taps, kind"),
    ({"terms": [Term("mse", TAPS, weight="a")]}, TypeError, "weight must be a float, got str"),
    ({"terms": [Term("dots", TAPS)]}, ValueError, "kind must be one of"),
    ({"reduction": "batchmean"}, ValueError, r"reduction must be one of \('none', 'mean', 'sum'\)"),
    ({"impl": "fast"}, ValueError, "impl must be None or one of"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' cannot run on cpu tensors here: this op has no CUDA C"),
    ({"x": X.double(), "impl": "cpp"}, ValueError, "impl='cpp' computes in fp32"),
    ({"x": (X * 100).byte(), "return_grad": True}, TypeError, "return_grad: x is uint8, which has no"),
]  # fmt: skip


def call(**changed):
    arguments = {"x": X, "target": TARGET, "trunk": TRUNK, "taps": TAPS} | changed
    if "terms" in changed:
        del arguments["taps"]
    return vaeops.perceptual_loss(
        arguments.pop("x"), arguments.pop("target"), arguments.pop("trunk"), **arguments
    )


@pytest.mark.parametrize(("changed", "error", "text"), LOSS)
def test_loss(changed, error, text):
    with pytest.raises(error, match="^(perceptual_loss|VGGTrunk): .*" + text):
        call(**changed)


@pytest.mark.parametrize("at", [1, 5, 20, 24, 28, 42])
def test_the_same_under_compile(at):
    changed, _, text = LOSS[at]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=text):
        torch.compile(lambda: call(**changed), fullgraph=True, backend="eager")()


A = torch.rand(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"a": 1}, TypeError, "a must be a tensor, got int"),
        ({"a": A.long()}, TypeError, "a must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"b": A.byte()}, TypeError, "b must be float32"),
        ({"a": A[0]}, ValueError, r"a must have shape \[B, C, h, w\], got \[4, 3, 3\]"),
        ({"b": A.double()}, TypeError, "b must have a's dtype torch.float32, got torch.float64"),
        ({"b": A[:, :2]}, ValueError, r"b must have a's shape \[2, 4, 3, 3\], got \[2, 2, 3, 3\]"),
        ({"b": A.to("meta")}, ValueError, "b is on meta, it must be on a's device cpu"),
        ({"kind": 3}, ValueError, "kind must be one of"),
        ({"kind": "lpips"}, TypeError, "lin must hold tensors, got NoneType"),
        ({"kind": "lpips", "lin": torch.rand(3)}, ValueError, r"lin must have shape \[4\]"),
        ({"lin": torch.rand(4)}, ValueError, "lin is for kind='lpips'"),
        ({"kind": "gram", "spatial": True}, ValueError, "spatial: kind='gram' has no pixels"),
        ({"reduction": None}, ValueError, "reduction must be one of"),
        ({"impl": "cuda"}, ValueError, "this op has no CUDA C"),
    ],
)
def test_distance(changed, error, text):
    arguments = {"a": A, "b": A} | changed
    with pytest.raises(error, match="^feature_distance: .*" + text):
        vaeops.feature_distance(arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize("method", ["features", "encode"])
@pytest.mark.parametrize(
    ("x", "taps", "error", "text"),
    [
        (X[0], TAPS, ValueError, "x must have shape"),
        (X.short(), TAPS, TypeError, "x must be float32"),
        (X.to("meta"), TAPS, ValueError, "trunk is on cpu, it must be on x's device meta"),
        (X, ("pool1", "relu1_1"), ValueError, "taps must be in the net's order"),
        (
            X[..., :1],
            ("pool1",),
            ValueError,
            "x is 16 x 1 pixels, the deepest tap .1 pools. needs at least 2 x 2",
        ),
        (X, ("conv6_1",), ValueError, "vgg11 has no 'conv6_1'"),
    ],
)
def test_features(method, x, taps, error, text):
    with pytest.raises(error, match="^VGGTrunk.*: .*" + text):
        getattr(trunk(), method)(x, taps)


def test_batch_statistics_mix_the_images():
    net = trunk("vgg11_bn", bn="batch")
    with pytest.raises(ValueError, match="reduction: bn='batch' mixes the images"):
        vaeops.perceptual_loss(X, TARGET, net, taps=TAPS, reduction="none")
    with pytest.raises(ValueError, match="return_grad is not there"):
        vaeops.perceptual_loss(X, TARGET, net, taps=TAPS, return_grad=True)


def test_a_convolution_before_its_batch_norm_is_no_tap():
    with pytest.raises(ValueError, match="taps: 4 is a convolution of vgg11_bn before its batch norm"):
        trunk("vgg11_bn").features(X, (4,))


def test_target_cache():
    with pytest.raises(ValueError, match="TargetCache: one map a tap is needed, got 1 maps, 2 taps"):
        TargetCache([A], ("relu1_1", "relu2_1"), trunk().identity)
