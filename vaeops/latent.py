"""A trained model's latent space: codes, lines and planes through them, directions, projections, probes.

Tensors in, tensors out, of any model that has `encode` and `decode`. `pca`, `tsne` and `probe` need
scikit-learn; `encode`, which takes a data set of `vaeops.train.data`, needs numpy, pillow and tqdm as that
does. The rest needs torch alone.

    z = latent.encode(model, faces)
    smile = latent.direction(z, faces.attribute("Smiling"))
    happier = latent.decode(model, latent.move(z[:8], {"Smiling": smile}, "1.5*Smiling"))
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._names import unknown
from .objectives import active_units as active_units

METHODS = ("linear", "spherical")
_TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?(\w+)\s*")


class Projection(NamedTuple):
    """points [N, dims]; share [dims] of the variance that each of them has, largest first."""

    points: Tensor
    share: Tensor


@torch.no_grad()
def encode(model: Any, dataset: Any, *, batch: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """The code of every sample of a data set: mu of a VAE, z of an autoencoder.

    Args:
        model: in eval mode, on the device, with the reference models' `encode`, `input_shape`, `input_range`
            and `classes`.
        dataset: a `vaeops.train.data.Dataset` of N samples; a model with classes is told its labels.
        batch: samples at once.

    Returns:
        fp32 [N, D] on the CPU, a code of several dims flattened.

    Raises:
        ValueError: the model has no codes or integer ones, or is in training mode; the data do not fit it.
    """
    from .train.evaluate import batches

    _check_model("encode", model)
    if not len(dataset):
        raise ValueError(f"encode: dataset must have samples, {dataset.name} has none")
    found = []
    for _, x, label in batches(model, dataset, batch, device, "encode"):
        code = model.encode(x) if label is None else model.encode(x, label)
        z = code[0] if isinstance(code, tuple) else code
        if not z.is_floating_point():
            raise ValueError(
                f"encode: model must have floating codes, those of {type(model).__name__} are integers"
            )
        found.append(z.flatten(1).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def decode(model: Any, z: Tensor, *, batch: int = 256) -> Tensor:
    """The samples of codes: `model.decode`, and the sigmoid of it where a VAE gives logits.

    Args:
        model: in eval mode, without classes.
        z: [*B, D], floating, on the model's device.
        batch: codes at once.

    Returns:
        [*B, *input_shape] on z's device, in the model's input_range; of `MultVAE` the items' logits.
    """
    _check_model("decode", model)
    if not z.is_floating_point() or z.dim() < 1:
        raise ValueError(f"decode: z must be floating, [*B, D], got {z.dtype} {list(z.shape)}")
    x = torch.cat([model.decode(part) for part in z.reshape(-1, z.shape[-1]).split(batch)])
    x = x.sigmoid() if getattr(model, "recon", None) == "bce_logits" else x
    return x.reshape(*z.shape[:-1], *x.shape[1:])


def interpolate(a: Tensor, b: Tensor, steps: int, method: str = "linear") -> Tensor:
    """T points on the way from a to b, the first a and the last b, to the bit; t = 0, ..., 1 in equal steps:

        "linear"     (1 - t) a + t b
        "spherical"  sin((1 - t) w) / sin w  a  +  sin(t w) / sin w  b,    w the angle between a and b

    A normal's draws in D dims have norms near sqrt(D); the middle of a line between two of them is shorter by
    about sqrt(2), which the arc is not.

    Args:
        a, b: [*E], alike, floating.
        steps: T >= 2.

    Returns:
        [T, *E], in a's dtype.

    Raises:
        ValueError: a and b differ in shape or dtype; for the arc, one is zero or they are opposite.

    Source: Shoemake, "Animating Rotation with Quaternion Curves", 1985; White, "Sampling Generative
    Networks", 2016.
    """
    if not a.is_floating_point() or a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            "interpolate: a and b must be floating, of one shape and dtype, "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    if steps < 2:
        raise ValueError(f"interpolate: steps must be at least 2, got {steps}")
    if method not in METHODS:
        raise ValueError(f"interpolate: method must be one of {METHODS}, got {method!r}")
    wide = torch.promote_types(a.dtype, torch.float32)
    first, last = a.to(wide), b.to(wide)
    t = torch.linspace(0, 1, steps, dtype=wide, device=a.device).view(-1, *[1] * a.dim())
    if method == "linear":
        return torch.lerp(first, last, t).to(a.dtype)
    if not first.any() or not last.any():
        raise ValueError("interpolate: a and b must not be zero with method='spherical'")
    u, v = first / first.norm(), last / last.norm()
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # exact where an arc cosine is not: near 0 and pi
    if angle > torch.pi - 1e-3:
        raise ValueError("interpolate: a and b point in opposite directions: between them is no shortest arc")
    if angle == 0:
        return torch.lerp(first, last, t).to(a.dtype)
    t = t[1:-1]
    arc = (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * last) / angle.sin()
    return torch.cat((a[None], arc.to(a.dtype), b[None]))


def direction(z: Tensor, has: Any, least: int = 10) -> Tensor:
    """From the codes without an attribute to those with it: mean of z[has] - mean of z[~has].

    Args:
        z: [N, D], floating.
        has: bool [N], a tensor or an array, as `Dataset.attribute` gives it.
        least: how many samples either side must have.

    Returns:
        [D], in z's dtype.

    Raises:
        ValueError: either side has fewer than `least`, naming how many.

    Source: Radford, Metz & Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative
    Adversarial Networks", 2016, section 6.3.2.
    """
    _check_codes("direction", z)
    has = torch.as_tensor(has, device=z.device)
    if has.dtype is not torch.bool or has.shape != z.shape[:1]:
        raise ValueError(f"direction: has must be bool [{len(z)}], got {has.dtype} {list(has.shape)}")
    some = int(has.sum())
    if min(some, len(z) - some) < max(least, 1):
        raise ValueError(
            f"direction: has must be true of at least {max(least, 1)} samples and false of as many, "
            f"got {some} and {len(z) - some}"
        )
    return z[has].mean(0) - z[~has].mean(0)


def move(z: Tensor, directions: Mapping[str, Tensor], recipe: str | Mapping[str, float]) -> Tensor:
    """z + sum of coefficient * direction: latent arithmetic with attributes.

    An attribute's opposite is its direction with a minus. CelebA has no "Old", but "Young": older and with
    glasses is "Eyeglasses - Young".

    Args:
        z: [*B, D].
        directions: name -> [D], of `direction`.
        recipe: "Eyeglasses - Young", "2.5*Eyeglasses + 0.5*Male"; or {"Eyeglasses": 2.5, "Male": 0.5}, which
            takes any name and any number.

    Returns:
        [*B, D], in z's dtype.

    Raises:
        ValueError: a name without a direction, with the nearest ones; a recipe that cannot be read.
    """
    for name, coefficient in (parse(recipe) if isinstance(recipe, str) else recipe).items():
        if name not in directions:
            raise ValueError(unknown("move: the recipe's direction", name, directions))
        z = z + (coefficient * directions[name]).to(z.dtype)
    return z


def parse(recipe: str) -> dict[str, float]:
    """A recipe's coefficients: "2*Smiling - Young" -> {"Smiling": 2.0, "Young": -1.0}.

    Raises:
        ValueError: it is no sum of terms.
    """
    found: dict[str, float] = {}
    text, position = recipe.replace("−", "-"), 0
    while position < len(text) or not found:
        term = _TERM.match(text, position)
        if term is None or (found and not term[1]):
            raise ValueError(
                "parse: recipe must be terms such as Eyeglasses or 2.5*Eyeglasses with + or - between, "
                f"got {recipe!r}"
            )
        coefficient = float(term[2] or 1) * (-1 if term[1] == "-" else 1)
        found[term[3]] = found.get(term[3], 0.0) + coefficient
        position = term.end()
    return found


def plane(origin: Tensor, a: Tensor, b: Tensor, n: int = 15, extent: float = 2.0) -> Tensor:
    """A square of the plane that two directions span: [i, j] is origin + t_j a + t_i b.

        t = -extent, ..., extent, in n equal steps: a rises with the column, b with the row

    Args:
        origin, a, b: [D].
        n: rows and columns; of an odd number the middle one is origin.
        extent: in units of a and b.

    Returns:
        [n, n, D], in origin's dtype.
    """
    if origin.dim() != 1 or a.shape != origin.shape or b.shape != origin.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (origin, a, b))
        raise ValueError(f"plane: origin, a and b must be [D], alike, got {shapes}")
    if n < 2 or not extent > 0:
        raise ValueError(f"plane: n must be at least 2 and extent positive, got {n} and {extent}")
    t = torch.linspace(-extent, extent, n, dtype=origin.dtype, device=origin.device)
    return origin + t[None, :, None] * a + t[:, None, None] * b


def manifold(n: int = 25, low: float = 0.05, high: float = 0.95) -> Tensor:
    """A grid over a 2-D latent with a normal prior, by quantiles: [i, j] is (q_j, q_i).

        q = Phi^-1(low), ..., Phi^-1(high), of n probabilities in equal steps: each cell has the same share

    Args:
        n: rows and columns.
        low, high: probabilities, 0 < low < high < 1.

    Returns:
        fp32 [n, n, 2]: the first latent dim rises with the column, the second with the row.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, figure 4.
    """
    if n < 2 or not 0 < low < high < 1:
        raise ValueError(f"manifold: n must be at least 2 and 0 < low < high < 1, got {n}, {low} and {high}")
    q = torch.special.ndtri(torch.linspace(low, high, n, dtype=torch.float64)).float()
    return torch.stack((q.expand(n, n), q[:, None].expand(n, n)), 2)


def pca(z: Tensor, dims: int = 2) -> Projection:
    """Principal components: z, less its mean, on the `dims` axes of the largest variance.

    Args:
        z: [N, D], finite.
        dims: at most N and D.

    Returns:
        Projection(points fp32 [N, dims], share fp32 [dims]) on the CPU. share is 0 where all codes are equal.
    """
    _check_codes("pca", z)
    if not 1 <= dims <= min(z.shape):
        raise ValueError(f"pca: dims must be in [1, {min(z.shape)}] for z {list(z.shape)}, got {dims}")
    _check_sklearn("pca")
    from sklearn.decomposition import PCA

    codes = _array("pca", z)
    if (codes == codes[0]).all():  # no variance to take a share of
        return Projection(torch.zeros(len(z), dims), torch.zeros(dims))
    found = PCA(dims, random_state=0)
    points = found.fit_transform(codes)
    return Projection(*(torch.from_numpy(part).float() for part in (points, found.explained_variance_ratio_)))


def tsne(z: Tensor, dims: int = 2, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """t-SNE, begun from PCA: neighbours stay neighbours; distances between groups mean little.

    Args:
        z: [N, D], finite. Some thousand rows take minutes.
        dims: 1, 2 or 3, at most D.
        perplexity: about how many neighbours count; below N.
        seed: of what is random in it.

    Returns:
        fp32 [N, dims] on the CPU.

    Source: van der Maaten & Hinton, "Visualizing Data using t-SNE", 2008.
    """
    _check_codes("tsne", z)
    if not 1 <= dims <= min(3, z.shape[1]):
        raise ValueError(f"tsne: dims must be in [1, {min(3, z.shape[1])}] for z {list(z.shape)}, got {dims}")
    if not 0 < perplexity < len(z):
        raise ValueError(f"tsne: perplexity must be in (0, {len(z)}), the number of rows, got {perplexity}")
    _check_sklearn("tsne")
    from sklearn.manifold import TSNE

    found = TSNE(dims, perplexity=perplexity, init="pca", random_state=seed)
    return torch.from_numpy(found.fit_transform(_array("tsne", z))).float()


@dataclass
class Probe:
    """A linear classifier of codes, of `probe`.

    accuracy: on the quarter of the rows that it did not see. majority: the share there of the commonest
        class, which is what knowing nothing gives. classes: the labels, in ascending order. model: of
        scikit-learn.
    """

    accuracy: float
    majority: float
    classes: tuple[int, ...]
    model: Any

    def probability(self, z: Tensor) -> Tensor:
        """z [N, D] -> fp32 [N, classes]; of bool labels the second column is that of True."""
        _check_codes("Probe", z)
        return torch.from_numpy(self.model.predict_proba(_array("Probe", z))).float()

    def confidence(self, z: Tensor) -> Tensor:
        """z [N, D] -> fp32 [N]: the probability of the most probable class."""
        return self.probability(z).amax(1)

    def score(self, z: Tensor, labels: Any) -> float:
        """The share of z [N, D] whose most probable class is its label [N]."""
        found = torch.tensor(self.classes)[self.probability(z).argmax(1)]
        return float((found == torch.as_tensor(labels).cpu().long()).double().mean())


def probe(z: Tensor, labels: Any, seed: int = 0) -> Probe:
    """How much of the labels a linear classifier finds in codes: logistic regression on standardised dims.

    It learns from three quarters of the rows, drawn by the seed with the classes' shares kept.

    Args:
        z: [N, D], finite; codes, or anything else, such as pixels.
        labels: bool or integer [N], a tensor or an array; at least two classes, each of at least 4 rows.

    Source: Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2017.
    """
    _check_codes("probe", z)
    labels = torch.as_tensor(labels).cpu()
    if labels.is_floating_point() or labels.shape != z.shape[:1]:
        raise ValueError(
            f"probe: labels must be bool or integer [{len(z)}], got {labels.dtype} {list(labels.shape)}"
        )
    classes, counts = labels.long().unique(return_counts=True)
    if len(classes) < 2 or counts.min() < 4:
        has = ", ".join(f"{count} of {label}" for label, count in zip(classes.tolist(), counts.tolist()))
        raise ValueError(f"probe: labels must be of at least two classes, each of at least 4 rows, got {has}")
    _check_sklearn("probe")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    target = labels.long().numpy()
    seen, held_out, known, wanted = train_test_split(
        _array("probe", z), target, test_size=0.25, stratify=target, random_state=seed
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(seen, known)
    majority = max(float((wanted == label).mean()) for label in classes.tolist())
    return Probe(float(model.score(held_out, wanted)), majority, tuple(classes.tolist()), model)


def _check_model(function: str, model: Any) -> None:
    name = type(model).__name__
    if not hasattr(model, function):
        raise ValueError(f"{function}: model must have {function}(), and {name} has none")
    if model.training:
        raise ValueError(
            f"{function}: model must be in eval mode, the {name} is in training: call its eval()"
        )


def _check_codes(function: str, z: Tensor) -> None:
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() != 2:
        got = f"{z.dtype} {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"{function}: z must be a floating tensor [N, D], got {got}")


def _array(function: str, z: Tensor) -> Any:
    """z [N, D] as scikit-learn takes it."""
    if not z.isfinite().all():
        raise ValueError(
            f"{function}: z must be finite, {int((~z.isfinite()).any(1).sum())} of its rows are not"
        )
    return z.detach().cpu().double().numpy()


def _check_sklearn(function: str) -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{function} needs the package scikit-learn: {error}") from error
