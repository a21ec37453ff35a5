"""Every GPU implementation on small shapes: `compute-sanitizer --tool memcheck python bench/sanitize.py`.

Small, because the sanitizer is a hundred times slower; odd sizes, because tails are where accesses go wrong.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import vaeops
from vaeops.ops._library import why_not

DEVICE = "cuda"
SHAPES = ((1, 1), (3, 63), (2, 3, 5, 7), (33, 97), (2, 16385))


def rng(impl: str) -> None:
    seeds = vaeops.rng.make_seed(DEVICE, batch=3)
    for n in (1, 63, 1025):
        vaeops.rng.normal((n,), seeds[0], impl=impl)
        vaeops.rng.normal((3, n), seeds, impl=impl)
    getattr(torch.ops.vaeops.fold_in, impl)(seeds, torch.arange(3, device=DEVICE))


def _step(shape: tuple[int, ...], dtype: torch.dtype, reduction: str, impl: str) -> None:
    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(size, device=DEVICE).to(dtype).requires_grad_()

    mu, logvar, moments = leaf(*shape), leaf(*shape), leaf(shape[0], 2 * shape[1], *shape[2:])
    prior = (leaf(*shape[1:]), leaf(*shape[1:]))
    options = {"reduction": reduction, "impl": impl}
    for out in (
        vaeops.reparam_kl(mu, logvar, **options),
        vaeops.reparam_kl(mu, logvar, prior=prior, **options),
        vaeops.reparam_kl(mu.transpose(0, 1), logvar.transpose(0, 1), clamp=(-1.0, 1.0), **options),
        vaeops.reparam_kl_packed(moments, **options),
    ):
        (out.z.float().sum() + out.kl.float().sum()).backward()
    vaeops.gaussian_log_prob(leaf(*shape), mu, logvar, **options).float().sum().backward()


def gaussian(impl: str) -> None:
    """Not every combination of shape, dtype and reduction: Triton compiles each, slowly under a sanitizer."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)
    reductions = ("batchmean", "sample", "dim", "none", "sample")
    for shape, dtype, reduction in zip(SHAPES, dtypes, reductions):
        _step(shape, dtype, reduction, impl)
    _step(SHAPES[-1], torch.float32, "dim", impl)


def vq(impl: str) -> None:
    """Both passes of the search, rows that the first leaves open, every estimator, empty segments."""
    for n, k, d in ((1, 1, 1), (97, 63, 3), (300, 200, 33), (70, 1030, 65)):
        x, codebook = (torch.randn(size, d, device=DEVICE, requires_grad=True) for size in (n, k))
        mask = torch.arange(n, device=DEVICE) % 5 != 1
        for metric, estimator, deterministic in zip(
            ("l2", "cosine", "dot"), ("ste", "rotation", "none"), (None, "bitwise", None)
        ):
            out = vaeops.vector_quantize(
                x,
                codebook,
                metric=metric,
                estimator=estimator,
                mask=mask,
                stats=True,
                deterministic=deterministic,
                impl=impl,
            )
            (out.quantized.sum() + out.commit_loss + out.codebook_loss).backward()
        vaeops.vq_assign(x, codebook[:1].expand(k, d), impl=impl)
        vaeops.vq_topk(x, codebook, min(k, 3), impl=impl)
        vaeops.vq_lookup(vaeops.vq_assign(x, codebook, impl=impl), codebook, impl=impl).sum().backward()


def perceptual(impl: str) -> None:
    """Every distance, taps on both sides of a ReLU and behind a pool, layers of each kernel, odd sizes."""
    taps = ("conv1_1", "relu2_1", "pool2", "relu3_2")
    lin = [torch.rand(k, device=DEVICE) for k in (64, 128, 128, 256)]
    for (height, width), precision, dtype in zip(
        ((4, 4), (17, 40), (33, 21)), ("fp32", "bf16", "fp32"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        trunk = vaeops.VGGTrunk.random("vgg11", seed=0, precision=precision).to(DEVICE)
        x = torch.randn(3, 3, height, width, device=DEVICE).to(dtype).requires_grad_()
        target = torch.randint(0, 256, x.shape, device=DEVICE, dtype=torch.uint8)
        terms = [vaeops.Term(kind, taps[:2]) for kind in ("mse", "l1", "smooth_l1", "gram")]
        terms.append(vaeops.Term("lpips", taps, lin=lin))
        vaeops.perceptual_loss(x, target, trunk, terms=terms, impl=impl).backward()
        image = torch.randn_like(x, requires_grad=True)
        vaeops.perceptual_loss(x, image, trunk, taps=taps, impl=impl).backward()
        a, b = (t.transpose(2, 3).repeat(1, 13, 1, 1) for t in (x, image))
        options = {"kind": "lpips", "lin": torch.rand(39, device=DEVICE), "spatial": True, "impl": impl}
        vaeops.feature_distance(a, b, **options).float().sum().backward()


def recon(impl: str) -> None:
    """Every kind, targets of bytes, weights and masks, each once: Triton compiles every combination."""
    kinds, reductions = vaeops.ref.recon.KINDS, ("batchmean", "sample", "sum")
    calls = [(kind, SHAPES[k % len(SHAPES)]) for k, kind in enumerate(kinds)]
    calls += [(kind, shape) for kind in ("mse", "multinomial") for shape in SHAPES]
    for k, (kind, shape) in enumerate(calls):
        pred = torch.rand(shape, device=DEVICE, requires_grad=True)
        target = (pred.detach(), torch.randint(256, shape, device=DEVICE, dtype=torch.uint8), pred > 0.3)[
            k % 3
        ]
        weight = torch.rand(shape[1:], device=DEVICE) if k % 3 == 1 else None
        mask = torch.rand(shape, device=DEVICE) > 0.5 if k % 3 == 2 else None
        options = {"weight": weight, "mask": mask, "reduction": reductions[k % 3], "impl": impl}
        vaeops.recon_loss(pred, target, kind, **options).sum().backward()


FAMILIES = {"rng": rng, "gaussian": gaussian, "vq": vq, "perceptual": perceptual, "recon": recon}
# One op of a family, none of which has a CUDA kernel.
WITHOUT_CUDA = {"perceptual": "perceptual_fwd"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/sanitize.py", description=__doc__)
    parser.add_argument("--case", choices=FAMILIES, help="one family; default: all")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/sanitize.py: no CUDA GPU", file=sys.stderr)
        return 2
    for impl in ("cuda", "triton"):
        for name, family in FAMILIES.items():
            if args.case in (None, name) and why_not(impl, DEVICE, WITHOUT_CUDA.get(name)) is None:
                family(impl)
                torch.cuda.synchronize()
                print(f"{name} {impl}: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
