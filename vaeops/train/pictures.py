"""`vaeops plot KIND RUN ...`: the pictures of trained models, each a short function of `KINDS`.

    vaeops plot latent runs/ae runs/vae --out latent.png

A kind takes what it is drawn of, `run` or `runs`, a reader of data sets where it needs one, and the file to
write; what else it takes is an option of the command. It returns figures, which the command prints. What a
model lacks for it is a ValueError that says so.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import gaussian_kl, latent as space, perplexity, rng
from ..models.prior import decode_codes
from ..nn import PosteriorMonitor
from . import evaluate, log, metrics, plots
from .data import Dataset, scale
from .data.codes import check_codes, checksum
from .latent_figures import classifier
from .runs import Run, at_most, rows, varied

Figures = dict[str, float | str]
Data = Callable[..., Dataset]  # (run, name=, split=), both the command's unless given

COLUMNS = 10
BOOKKEEPING = ("step", "epoch", "images_per_s", "seconds", "lr")  # of a log: no losses
TITLES = {"loss": "total, weighted", "recon": "reconstruction", "kl": "KL to the prior, nats",
          "mu_abs": "mean |mu|", "logvar": "mean log-variance", "z_abs": "mean |z|",
          "beta": "weight of the KL", "commit": "commitment", "noise_mse": "squared error of the noise",
          "grad_norm": "norm of the gradient"}  # fmt: skip
CALLED = {"digits": "digit", "mnist": "digit"}  # what a data set's labels are


# ---- what the kinds share


def _need_latent(run: Run, kind: str, decodes: bool = False) -> int:
    """The width of the model's latent."""
    width = getattr(run.model, "latent_dim", None)
    if width is None:
        raise ValueError(f"{kind} needs a continuous latent, and {run} has none")
    if decodes and run.model.classes:
        raise ValueError(f"{kind} decodes codes without labels, and {run} takes them")
    return width


def _need_labels(data: Dataset, kind: str) -> np.ndarray:
    if data.labels is None:
        raise ValueError(f"{kind} needs labels, and {data.name} has none")
    return np.asarray(data.labels)


def _need_one_code(run: Run, kind: str) -> None:
    model = run.model
    if not hasattr(model, "grids"):
        raise ValueError(f"{kind} needs a model with a codebook, and {run} has none")
    if model.grids != ((),):
        sizes = " and ".join("x".join(map(str, grid)) for grid in model.grids)
        raise ValueError(f"{kind} needs a model of one code an image (workshop-vq), and {run} has {sizes}")


def _coloured(data: Dataset, attribute: str) -> tuple[np.ndarray | None, Sequence[str], str]:
    """(labels or None, their names, what they are) to colour points by."""
    if attribute:
        return data.attribute(attribute).astype(int), ("without", "with"), attribute
    if data.labels is None:
        return None, (), ""
    labels = np.asarray(data.labels)
    names = data.label_names or tuple(map(str, range(labels.max() + 1)))
    return labels, names, CALLED.get(data.name, "label")


# ---- the kinds


def reconstructions(runs: list[Run], read: Data, out: Path, *, images: int = 20) -> Figures:
    """Originals over what the models make of them."""
    data = varied(read(runs[0]), images)
    rows: dict[str, np.ndarray] = {}
    figures: Figures = {}
    for run in runs:
        if not hasattr(run.model, "reconstruct"):
            raise ValueError(f"reconstructions: {run} does not reconstruct")
        x, label = run.inputs(data)
        original = run.images(x)
        rows.setdefault("original", original)
        if hasattr(run.model, "noisy"):  # it is to undo noise
            x = run.model.noisy(x, torch.tensor([0, 0], device=run.device))
            rows[f"noisy, for {run.name}" if len(runs) > 1 else "noisy"] = run.images(x)
        decoded = run.images(run.model.reconstruct(x, label))
        rows[run.name if len(runs) > 1 else "decoded"] = decoded
        figures[f"mse of these, {run.name}"] = float(np.square(decoded - original).mean())
    plots.image_bands(out, f"Images of {data.name} and what becomes of them", rows, COLUMNS)
    return figures


def losses(runs: list[Run], out: Path) -> Figures:
    """Each loss by the step, and what else the log has; several runs in one."""
    parts: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    figures: Figures = {}
    for run in runs:
        if run.log is None:
            raise ValueError(f"losses needs the log of a run, and there is no {log.FILE} with {run.path}")
        records = log.read(run.log)
        if not records:
            raise ValueError(f"losses: {run.log} has no lines yet")
        for name in dict.fromkeys(key for record in records for key in record if key not in BOOKKEEPING):
            found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            x, y = np.array(found, float).reshape(-1, 2).T
            parts.setdefault(TITLES.get(name, name.replace("_", " ")), {})[run.name] = (x, y)
            if name in ("loss", "recon", "kl") and len(y):
                figures[f"last {name}, {run.name}"] = float(y[-1])
    names = f" of {runs[0].name}" if len(runs) == 1 else ""
    plots.curves(out, f"Losses in training{names}", parts, "step")
    return figures


def latent(runs: list[Run], read: Data, out: Path, *, samples: int = 3000,
           attribute: str = "") -> Figures:  # fmt: skip
    """The codes of a two-dimensional latent, coloured by their labels; several models side by side."""
    for run in runs:
        if (width := _need_latent(run, "latent")) != 2:
            raise ValueError(f"latent needs a 2-D latent, that of {run.name} has {width} dimensions: "
                             "use pca or tsne")  # fmt: skip
    names = ("dimension 1", "dimension 2")

    def points(run: Run, z: Tensor) -> plots.Plane:
        return plots.Plane(z.numpy(), names)

    return _scattered(runs, read, out, samples, attribute, points, "Codes of {} in the latent plane")


def pca(runs: list[Run], read: Data, out: Path, *, samples: int = 3000, attribute: str = "") -> Figures:
    """The codes along the two directions in which they vary most, coloured by their labels."""
    for run in runs:
        _need_latent(run, "pca")
    figures: Figures = {}

    def points(run: Run, z: Tensor) -> plots.Plane:
        found = space.pca(z)
        one, two = found.share.tolist()
        figures[f"share of the variance, {run.name}"] = one + two
        return plots.Plane(found.points.numpy(), (f"component 1, {one:.0%} of the variance",
                                                  f"component 2, {two:.0%}"))  # fmt: skip

    title = "Codes of {} by their principal components"
    return _scattered(runs, read, out, samples, attribute, points, title) | figures


def tsne(runs: list[Run], read: Data, out: Path, *, samples: int = 2000, attribute: str = "",
         perplexity: float = 30.0, seed: int = 0) -> Figures:  # fmt: skip
    """The codes with neighbours kept together (t-SNE), coloured by their labels."""
    for run in runs:
        _need_latent(run, "tsne")

    def points(run: Run, z: Tensor) -> plots.Plane:
        found = space.tsne(z, perplexity=perplexity, seed=seed)
        return plots.Plane(found.numpy(), ("t-SNE 1", "t-SNE 2"))

    return _scattered(runs, read, out, samples, attribute, points, "Codes of {} by t-SNE")


def _scattered(runs: list[Run], read: Data, out: Path, samples: int, attribute: str,
               points: Callable[[Run, Tensor], plots.Plane], title: str) -> Figures:  # fmt: skip
    data = at_most(read(runs[0]), samples)
    coloured = _coloured(data, attribute)  # first, since it is quick to object
    parts = {run.name: points(run, space.encode(run.model, data, device=run.device)) for run in runs}
    title = title.format(data.name) + (f": {runs[0].name}" if len(runs) == 1 else "")
    plots.planes(out, title, parts, *coloured)
    return {"samples": len(data)}


def manifold(runs: list[Run], read: Data, out: Path, *, side: int = 25) -> Figures:
    """What the places of a two-dimensional latent decode to.

    A VAE's at quantiles of its prior, so that each image stands for the same share of samples; an
    autoencoder's, which has no prior, over the middle 90 % of its codes.
    """
    maps = {}
    for run in runs:
        if (width := _need_latent(run, "manifold", decodes=True)) != 2:
            raise ValueError(f"manifold needs a 2-D latent, that of {run.name} has {width} dimensions")
        if "kl" in run.model.weights:
            z = space.manifold(side)
        else:
            codes = space.encode(run.model, at_most(read(run), 3000), device=run.device)
            low, high = codes.quantile(torch.tensor([0.05, 0.95]), dim=0)
            x, y = (torch.linspace(float(a), float(b), side) for a, b in zip(low, high))
            z = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
        maps[run.name] = plots.Map(run.decoded(z), z[0, :, 0].numpy(), z[:, 0, 1].numpy())
    names = ("dimension 1", "dimension 2")
    plots.image_maps(out, "What the latent plane decodes to", maps, names)
    return {}


def samples(run: Run, out: Path, *, images: int = 100, seed: int = 0, decoder: str = "") -> Figures:
    """Draws from the prior, decoded; of a model with classes all labels in turn."""
    vq = run
    if decoder:
        vq = Run(Path(decoder), "cpu")
        if not hasattr(vq.model, "grids"):
            raise ValueError(f"decoder must be a model with a codebook, and {vq} has none")
        check_codes(run.model, vq.model.codes, checksum(vq.model), str(vq))
    x = evaluate.draw(run.model, images, seed=seed, device=run.device)
    if decoder:
        x = decode_codes(vq.model, x)
    evaluate.check_decoded(x, str(run))
    drawn = vq.images(x)
    plots.image_grid(out, f"Samples of {run.name}", drawn, COLUMNS)
    return {}


def holes(runs: list[Run], read: Data, out: Path, *, images: int = 24, samples: int = 1000,
          seed: int = 0) -> Figures:  # fmt: skip
    """Samples of the models, and how sure a classifier of the data is of them.

    An autoencoder has no prior: its latent is drawn from normals with the mean and deviation of its codes.
    """
    data = at_most(read(runs[0]), 5000)
    _need_labels(data, "holes")
    judge = classifier(read(runs[0], split="train"), data, seed=seed)
    x, _ = data.batch(torch.arange(len(data)))
    drawn, confidence = {}, {data.name: judge.confidence(scale(x, data.peak, (0, 1))).numpy()}
    figures: Figures = {"accuracy of the classifier": judge.accuracy}
    for run in runs:
        if hasattr(run.model, "sample"):
            x = evaluate.draw(run.model, samples, seed=seed, device=run.device)
        else:
            _need_latent(run, "holes", decodes=True)
            z = space.encode(run.model, data, device=run.device)
            noise = rng.normal((samples, z.shape[1]), torch.tensor([seed, 0]))
            x = space.decode(run.model, (z.mean(0) + z.std(0) * noise).to(run.device)).cpu()
        drawn[run.name] = run.images(x[:images])
        confidence[run.name] = judge.confidence(evaluate.as_images(x, run.model.input_range)).numpy()
    for name, values in confidence.items():
        figures[f"mean confidence, {name}"] = float(values.mean())
        figures[f"share below 0.9, {name}"] = float((values < 0.9).mean())
    plots.holes(out, "Samples, and how sure a classifier is of them", drawn, confidence)
    return figures


def interpolation(runs: list[Run], read: Data, out: Path, *, pairs: int = 4, steps: int = 10,
                  method: str = "linear") -> Figures:  # fmt: skip
    """Decoded lines from one image's code to another's, the images themselves at the ends.

    The figure is the largest step, in even ones, on average over about 100 pairs: 1 where all steps are
    alike, steps - 1 where all change comes at once.
    """
    for run in runs:
        _need_latent(run, "interpolation", decodes=True)
    data = varied(read(runs[0]), max(2 * pairs + 20, 220))
    # Labels come in turn: of ten, this distance in rows joins each with the one five further.
    distance = len(data) // 2 + (5 - len(data) // 2) % 10
    ends = [(i, i + distance) for i in range(len(data) - distance)]
    if len(ends) < pairs:
        raise ValueError(f"interpolation: {data.name} has {len(data)} images, too few for {pairs} pairs")
    parts: dict[int, list[tuple[str, np.ndarray]]] = {}
    figures: Figures = {}
    for run in runs:
        x, _ = run.inputs(data)
        z = run.codes(x)
        paths = [space.interpolate(z[a], z[b], steps, method) for a, b in ends]
        decoded = space.decode(run.model, torch.stack(paths).to(run.device)).cpu()
        even = (decoded[:, -1] - decoded[:, 0]).flatten(1).norm(dim=1) / (steps - 1)
        largest = torch.stack([metrics.largest_step(path) for path in decoded])
        figures[f"largest step, {run.name}"] = float((largest / even).mean())
        for k, (a, b) in enumerate(ends[:pairs]):
            row = torch.cat((x[a, None].cpu(), decoded[k], x[b, None].cpu()))
            parts.setdefault(k, []).append((run.name if len(runs) > 1 else "", run.images(row)))
    of = f" of {runs[0].name}" if len(runs) == 1 else ""
    heads = ["image", *(f"{t:.2g}" for t in np.linspace(0, 1, steps)), "image"]
    panels = [plots.Panel(lines, () if k else heads) for k, lines in parts.items()]
    plots.panels(out, f"Between images of {data.name}, {method} in the latent{of}", *panels)
    return figures


def directions(run: Run, read: Data, out: Path, *, recipe: str = "Eyeglasses", strength: float = 2.0,
               images: int = 10, samples: int = 5000, least: int = 10) -> Figures:  # fmt: skip
    """What attributes are in the latent: mean codes with and without them, and images moved along them.

    The images are those without what the recipe adds and with what it takes away. The figures: how well a
    linear classifier of codes finds each attribute, and the probability that it gives to it on average, in
    images decoded before the move and after it, each encoded again.
    """
    _need_latent(run, "directions", decodes=True)
    data = at_most(read(run), samples)
    terms = space.parse(recipe)
    has = {name: data.attribute(name) for name in terms}
    z = space.encode(run.model, data, device=run.device)
    found = {name: space.direction(z, mask, least) for name, mask in has.items()}
    lacking = np.flatnonzero(np.all([mask != (terms[name] > 0) for name, mask in has.items()], axis=0))
    if len(lacking) < images:
        raise ValueError(f"directions: {len(lacking)} of {len(data)} samples have nothing of {recipe!r} yet, "
                         f"and {images} are to be moved: give fewer --images or more --samples")  # fmt: skip
    means = []
    for name, mask in has.items():
        codes = torch.stack((z[mask].mean(0), z[~mask].mean(0), found[name]))
        means.append((name, run.decoded(codes)))
    before = z[lacking]
    after = space.move(before, found, {name: strength * by for name, by in terms.items()})
    shown = run.inputs(rows(data, lacking[:images]))[0]
    moved = [("image", run.images(shown)), ("decoded", run.decoded(before[:images])),
             (f"moved by {strength:g}", run.decoded(after[:images]))]  # fmt: skip
    heads = ("with", "without", "difference")
    plots.panels(out, f"{recipe}, a direction of the latent of {run.name}",
                 plots.Panel(means, heads, "Decoded means of codes, and their difference, decoded"),
                 plots.Panel(moved, (), "Images moved along it"))  # fmt: skip
    return _probed(run, z, has, before, after)


def _probed(run: Run, z: Tensor, has: dict[str, np.ndarray], before: Tensor, after: Tensor) -> Figures:
    figures: Figures = {}
    seen = [run.codes(space.decode(run.model, codes.to(run.device))) for codes in (before, after)]
    for name, mask in has.items():
        probe = space.probe(z, mask)
        figures |= {f"{name}: accuracy of a probe": probe.accuracy, f"{name}: majority": probe.majority}
        for when, codes in zip(("before", "after"), seen):
            figures[f"{name}: probability {when}"] = float(probe.probability(codes)[:, 1].mean())
    return figures


def plane(run: Run, read: Data, out: Path, *, across: str = "Smiling", up: str = "Eyeglasses", side: int = 15,
          extent: float = 2.0, samples: int = 5000, least: int = 10) -> Figures:  # fmt: skip
    """The mean code moved along two attributes at once, decoded."""
    _need_latent(run, "plane", decodes=True)
    data = at_most(read(run), samples)
    masks = [data.attribute(name) for name in (across, up)]
    z = space.encode(run.model, data, device=run.device)
    a, b = (space.direction(z, mask, least) for mask in masks)
    images = run.decoded(space.plane(z.mean(0), a, b, side, extent))
    at = np.linspace(-extent, extent, side)
    plots.image_maps(out, f"The mean code of {data.name}, moved along two attributes",
                     {run.name: plots.Map(images, at, at)}, (across, up))  # fmt: skip
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    return {f"cosine of {across} and {up}": cosine}


def codebook(run: Run, out: Path) -> Figures:
    """What each code of a model with one code an image decodes to, in the codebook's order."""
    _need_one_code(run, "codebook")
    x = decode_codes(run.model, torch.arange(run.model.codes, device=run.device)[:, None])
    images = run.images(x)
    columns = min(8, len(images))
    parts = []
    for i in range(0, len(images), columns):
        heads = [str(k) for k in range(i, min(i + columns, len(images)))]
        parts.append(plots.Panel([("", images[i : i + columns])], heads))
    plots.panels(out, f"What each code of {run.name} decodes to", *parts)
    return {"codes": run.model.codes}


@torch.no_grad()
def codes(run: Run, read: Data, out: Path) -> Figures:
    """How many images of each label have each code; one code an image.

    Purity is the share of images that their code's commonest label names right.
    """
    _need_one_code(run, "codes")
    data = read(run)
    labels = torch.as_tensor(_need_labels(data, "codes"))
    _, names, what = _coloured(data, "")
    found = [run.model.encode(x).cpu()
             for _, x, _ in evaluate.batches(run.model, data, 256, run.device, "encode")]  # fmt: skip
    size = (run.model.codes, len(names))
    table = torch.bincount(torch.cat(found) * size[1] + labels, minlength=math.prod(size)).view(size)
    used = [k for k in plots.code_order(table.numpy()) if table[k].sum()]
    spread = float(perplexity(table.sum(1)))
    title = f"{len(used)} of {len(table)} codes in use, perplexity {spread:.1f}"
    plots.code_table(out, title, table[used].numpy(), used, names, what)
    purity = float(table.amax(1).sum() / table.sum())
    return {"perplexity": spread, "codes in use": len(used), "purity": purity}


def anomaly(runs: list[Run], read: Data, out: Path, *, outliers: str, samples: int = 5000) -> Figures:
    """Errors of reconstruction, of the data and of another data set; the AUROC tells how far they differ."""
    sets = [at_most(data, samples) for data in (read(runs[0]), read(runs[0], name=outliers))]
    parts: dict[str, dict[str, np.ndarray]] = {}
    figures: Figures = {}
    for run in runs:
        inside, outside = (evaluate.errors(run.model, data, device=run.device) for data in sets)
        figures[f"auroc, {run.name}"] = score = metrics.auroc(inside, outside)
        parts[f"{run.name}: AUROC {score:.3f}"] = {sets[0].name: inside, f"{outliers}, outliers": outside}
    plots.histograms(out, "Errors of reconstruction", parts, "squared error of an element")
    return figures


@torch.no_grad()
def kl(runs: list[Run], read: Data, out: Path, *, samples: int = 5000) -> Figures:
    """The KL of each dimension of the latent, and which are active."""
    for run in runs:
        if "kl" not in run.model.weights:
            raise ValueError(f"kl needs a VAE, and {run} has no KL")
    data = at_most(read(runs[0]), samples)
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    figures: Figures = {}
    for run in runs:
        monitor = PosteriorMonitor(run.model.latent_dim).to(run.device)
        for _, x, label in evaluate.batches(run.model, data, 256, run.device, "encode"):
            mu, logvar = run.model.encode(x, label)
            monitor.update(mu, gaussian_kl(mu, logvar, reduction="dim"))
        active = monitor.variance() > monitor.threshold
        parts[run.name] = monitor.kl.cpu().numpy(), active.cpu().numpy()
        figures[f"kl, {run.name}"] = float(monitor.kl.sum())
        figures[f"active, {run.name}"] = int(active.sum())
    plots.kl_bars(out, "KL of each dimension of the latent", parts)
    return figures


def denoising(run: Run, out: Path, *, images: int = 8, steps: int = 10, seed: int = 0) -> Figures:
    """Samples of a diffusion model as they form, from noise to image."""
    if not hasattr(run.model, "denoise"):
        raise ValueError(f"denoising needs a diffusion model, and {run} is none")
    states = list(run.model.denoise(images, torch.tensor([seed, 0], device=run.device)))
    shown = np.unique(np.linspace(0, run.model.steps, steps + 1).round().astype(int))
    columns = np.stack([run.images(states[i]) for i in shown], 1)
    heads = [f"t = {run.model.steps - i}" for i in shown]
    panel = plots.Panel([("", row) for row in columns], heads)
    plots.panels(out, f"Images of {run.name} out of noise", panel)
    return {}


KINDS: dict[str, Callable[..., Figures]] = {
    kind.__name__: kind
    for kind in (reconstructions, losses, latent, pca, tsne, manifold, samples, holes, interpolation,
                 directions, plane, codebook, codes, anomaly, kl, denoising)
}  # fmt: skip
HELP = {
    "images": "how many are shown",
    "samples": "how many are looked at",
    "attribute": "colour by it instead of by labels",
    "perplexity": "about how many neighbours count",
    "seed": "of what is random",
    "side": "images in a row and in a column",
    "decoder": "the VQ-VAE that makes images of a code-prior's codes",
    "pairs": "how many lines",
    "steps": "images of a row",
    "method": "linear or spherical",
    "recipe": "attributes to add and take away: 'Eyeglasses - Young'; with a minus first, --recipe=-Young",
    "strength": "factor of the recipe",
    "least": "samples that an attribute needs, with it and without",
    "across": "attribute",
    "up": "attribute",
    "extent": "of the plane, in differences of the means",
    "outliers": "the other data set",
}
