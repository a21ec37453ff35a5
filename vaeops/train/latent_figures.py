"""`vaeops experiment latent-faces` and `latent-digits`: what is said of latent spaces, as figures.

Faces: does moving a code along an attribute's direction give its face the attribute? A linear probe of the
codes, trained on the attribute's labels, judges what is decoded from the moved code and encoded again.

Digits: is a VAE's latent smoother than an autoencoder's, and without its holes? Lines between the codes of
two digits and draws from a prior are decoded; a classifier of pixels says how sure it is of what they are.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import latent, rng
from . import data as datasets, evaluate, metrics
from .data import Dataset

RECIPES = ("Smiling", "2*Smiling", "-Smiling", "Eyeglasses", "2*Eyeglasses", "-Eyeglasses",
           "Eyeglasses - Young", "2*Eyeglasses - 2*Young")  # fmt: skip
CLASSIFIER_IMAGES, CLASSIFIER_EPOCHS = 20_000, 10
SURE = 0.9  # confidence from which an image is taken for a digit without doubt
Model = Any


class Attribute(NamedTuple):
    """Of the probe on the test faces: its accuracy, that of always the commoner answer, and its AUROC."""

    probe: float
    majority: float
    auroc: float


class Shift(NamedTuple):
    """What a recipe does to one of its attributes, by the probe on the faces that are encoded again.

    before, after: mean probability of the attribute. other: after moves of the same length, each from one
    training face towards another. crossed: of the faces on the far side of 1/2, the share that came over.
    """

    faces: int
    before: float
    after: float
    other: float
    crossed: float


def faces(model: Model, train: Dataset, test: Dataset, recipes: Sequence[str] = RECIPES, *, seed: int = 0
          ) -> tuple[dict[str, Attribute], dict[str, dict[str, Shift]]]:  # fmt: skip
    """How well codes tell the recipes' attributes; and what recipes do: recipe -> attribute -> Shift.

    Directions and probes are of the training faces. The figures are of the test faces; of a recipe, of those
    that lack all that it adds and have all that it takes away.
    """
    wanted = {recipe: latent.parse(recipe) for recipe in recipes}
    names = sorted({name for terms in wanted.values() for name in terms})
    z, z_test = latent.encode(model, train), latent.encode(model, test)
    has = {name: torch.from_numpy(test.attribute(name)) for name in names}
    directions = {name: latent.direction(z, train.attribute(name)) for name in names}
    probes = {name: latent.probe(z, train.attribute(name), seed) for name in names}
    told = {}
    for name in names:
        share, p = float(has[name].double().mean()), probes[name].probability(z_test)[:, 1].numpy()
        if not 0 < share < 1:
            raise ValueError(f"{test.name}: {name} must be true of some test faces and false of others")
        auroc = metrics.auroc(p[~test.attribute(name)], p[test.attribute(name)])
        told[name] = Attribute(probes[name].score(z_test, has[name]), max(share, 1 - share), auroc)
    order = torch.Generator().manual_seed(seed)
    shifts = {}
    for recipe, terms in wanted.items():
        start = torch.stack([has[n] if weight < 0 else ~has[n] for n, weight in terms.items()]).all(0)
        if not start.any():
            raise ValueError(f"{test.name}: {recipe!r} has no test face to begin with")
        codes = z_test[start]
        step = latent.move(torch.zeros_like(z[0]), directions, recipe)
        ends = z[torch.randint(len(z), (2, len(codes)), generator=order)]
        other = normalize(ends[1] - ends[0]) * step.norm()
        again = [_again(model, codes + by) for by in (0, step, other)]
        shifts[recipe] = {name: _shift(probes[name], again, weight > 0) for name, weight in terms.items()}
    return told, shifts


def _again(model: Model, z: Tensor) -> Tensor:
    """The codes of what z decodes to."""
    return latent.encode(model, Dataset("decoded", latent.decode(model, z), peak=0))


def _shift(probe: latent.Probe, again: Sequence[Tensor], up: bool) -> Shift:
    before, after, other = (probe.probability(z)[:, 1] for z in again)
    far, over = (before < 0.5, after > 0.5) if up else (before > 0.5, after < 0.5)
    crossed = float((far & over).sum() / far.sum())
    return Shift(len(before), float(before.mean()), float(after.mean()), float(other.mean()), crossed)


class Classifier(NamedTuple):
    """A small network of scikit-learn on pixels. accuracy: on the test images."""

    network: Any
    accuracy: float

    def confidence(self, images: Tensor) -> Tensor:
        """images [N, ...] in [0, 1] -> fp32 [N], the probability of the most probable class."""
        return torch.from_numpy(self.network.predict_proba(images.flatten(1).numpy())).amax(1).float()


def classifier(train: Dataset, test: Dataset, *, seed: int = 0) -> Classifier:
    """Of the labels, by a hidden layer of 256, from at most CLASSIFIER_IMAGES of the training images."""
    from sklearn.neural_network import MLPClassifier

    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CLASSIFIER_IMAGES]
    (x, labels), (x_test, labels_test) = _labelled(train, rows), _labelled(test, torch.arange(len(test)))
    network = MLPClassifier((256,), random_state=seed)
    for _ in range(CLASSIFIER_EPOCHS):
        network.partial_fit(x, labels, classes=np.unique(labels))
    return Classifier(network, float(network.score(x_test, labels_test)))


def _labelled(data: Dataset, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x, labels = data.batch(rows)
    if labels is None:
        raise ValueError(f"{data.name} has no labels")
    return datasets.scale(x, data.peak, (0, 1)).flatten(1).numpy(), labels.numpy()


class Smoothness(NamedTuple):
    """Of lines between codes. step: the mean line's largest step, in even steps; error: of that mean.

    confidence: the classifier's in the middle third of a line, mean.
    """

    step: float
    error: float
    confidence: float


def smoothness(model: Model, data: Dataset, judge: Classifier, *, pairs: int = 500, steps: int = 11,
               seed: int = 0) -> Smoothness:  # fmt: skip
    """Of lines between the codes of two samples of different labels, the same pairs for every model.

        step = max_t |x_{t+1} - x_t| / (|x_T - x_1| / (T - 1)),    x_1, ..., x_T the decoded points of a line

    It is 1 at least, and 1 for a cross-fade of pixels: what lies between the ends is the confidence's matter.

    Args:
        pairs: lines. steps: T.
    """
    z, labels = latent.encode(model, data), torch.as_tensor(data.labels)
    drawn = torch.randint(len(z), (2, 4 * pairs), generator=torch.Generator().manual_seed(seed))
    a, b = drawn[:, labels[drawn[0]] != labels[drawn[1]]][:, :pairs]
    frames = latent.decode(model, latent.interpolate(z[a], z[b], steps))
    even = (frames[-1] - frames[0]).flatten(1).norm(dim=1) / (steps - 1)
    largest = torch.stack([metrics.largest_step(frames[:, i]) for i in range(len(a))]) / even
    middle = evaluate.as_images(frames[steps // 3 : -(steps // 3)].flatten(0, 1), model.input_range)
    error = largest.std() / len(a) ** 0.5
    return Smoothness(float(largest.mean()), float(error), float(judge.confidence(middle).mean()))


class Sure(NamedTuple):
    """confidence: the classifier's, mean of an image. share: of the images with at least SURE."""

    confidence: float
    share: float


def holes(ae: Model, vae: Model, data: Dataset, judge: Classifier, *, samples: int = 2000, seed: int = 0
          ) -> dict[str, Sure]:  # fmt: skip
    """How sure the classifier is of images of the data, their reconstructions, and what either model draws.

    An autoencoder has no prior: its z are draws of N(0, I), and of a normal fitted to the data's codes.
    """
    z = latent.encode(ae, data).double()
    normal = rng.normal((samples, z.shape[1]), torch.tensor([seed, 0]))
    fitted = torch.from_numpy(np.random.default_rng(seed).multivariate_normal(
        z.mean(0).numpy(), torch.cov(z.T).numpy(), samples)).float()  # fmt: skip
    x, _ = data.batch(torch.arange(min(samples, len(data))))
    x = datasets.scale(x, data.peak, (0, 1)).flatten(1)
    found = {
        "the data": x,
        "reconstructed, autoencoder": ae.reconstruct(x.reshape(-1, *ae.input_shape)),
        "reconstructed, VAE": vae.reconstruct(x.reshape(-1, *vae.input_shape)),
        "z of N(0, I), autoencoder": latent.decode(ae, normal),
        "z of a normal fitted to codes, autoencoder": latent.decode(ae, fitted),
        "z of N(0, I), VAE": evaluate.draw(vae, samples, seed=seed),
    }
    sure = {name: judge.confidence(images) for name, images in found.items()}
    return {name: Sure(float(p.mean()), float((p >= SURE).double().mean())) for name, p in sure.items()}


def faces_main(arguments: Sequence[str] | None = None) -> None:
    """`vaeops experiment latent-faces`."""
    parser = _parser("latent-faces", "What directions of attributes do to faces, by a linear probe.")
    parser.add_argument("run", type=Path, help="a VAE of faces: a run's folder, a checkpoint, a saved model")
    parser.add_argument("--recipe", action="append", metavar="TEXT",
                        help=f"repeatable: --recipe=-Male (default: {', '.join(RECIPES)})")  # fmt: skip
    parser.add_argument("--cache", help="folder of the decoded images (default: the training's)")
    args = parser.parse_args(arguments)
    try:
        model, config, loaded = evaluate.load_model(args.run)
        options = {"root": args.root or config.get("root"), "cache": args.cache or config.get("cache"),
                   "size": model.input_shape[-1]}  # fmt: skip
        train, test = (datasets.load("celeba", split=split, **options) for split in ("train", "test"))
        told, shifts = faces(model, train, test, args.recipe or RECIPES, seed=args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{model.preset}, {loaded}; directions and probes of {len(train):,} training faces, figures of "
          f"{len(test):,} test faces\n")  # fmt: skip
    _table(("attribute",), Attribute._fields, {(name,): found for name, found in told.items()})
    print()
    rows = {(recipe, name): shift for recipe, found in shifts.items() for name, shift in found.items()}
    _table(("recipe", "probability of"), Shift._fields, rows)


def digits_main(arguments: Sequence[str] | None = None) -> None:
    """`vaeops experiment latent-digits`."""
    parser = _parser("latent-digits", "How smooth the latents of an autoencoder and a VAE are; their holes.")
    parser.add_argument("ae", type=Path, help="an autoencoder: a run's folder, a checkpoint, a saved model")
    parser.add_argument("vae", type=Path, help="a VAE of the same data")
    parser.add_argument("--data", choices=("mnist", "fashion-mnist", "digits"), default="mnist")
    args = parser.parse_args(arguments)
    try:
        (ae, config, ae_loaded), (vae, _, vae_loaded) = (evaluate.load_model(p) for p in (args.ae, args.vae))
        root = args.root or config.get("root")
        train, test = (datasets.load(args.data, root, split=split) for split in ("train", "test"))
        judge = classifier(train, test, seed=args.seed)
        lines = {(f"of the {name}",): smoothness(model, test, judge, seed=args.seed)
                 for name, model in (("autoencoder", ae), ("VAE", vae))}  # fmt: skip
        sure = holes(ae, vae, test, judge, seed=args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{ae.preset}, {ae_loaded}; {vae.preset}, {vae_loaded}; {args.data}, test; the classifier is right "
          f"about {judge.accuracy:.3f} of it\n")  # fmt: skip
    _table(("lines between two digits",), Smoothness._fields, lines)
    print()
    _table(("images",), ("confidence", f">= {SURE}"), {(name,): found for name, found in sure.items()})


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vaeops experiment {name}", description=description)
    parser.add_argument("--root", help="folder of the data sets (default: the training's)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _table(names: tuple[str, ...], columns: tuple[str, ...],
           rows: Mapping[Any, Sequence[float]]) -> None:  # fmt: skip
    """Prints rows under their columns; the names of a row are as many as `names`."""
    widths = [max(map(len, column)) + 2 for column in zip(names, *rows)]
    for row, values in {names: columns, **rows}.items():
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)
        left = "".join(f"{name:<{width}}" for name, width in zip(row, widths))
        print(left + "".join(f"{cell:>12}" for cell in cells))
