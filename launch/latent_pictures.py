"""Pictures that need an encoder, by a VAE: reconstructions, walks between images, and content swapped with style."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gan.errors import UserError
from launch.samples import check_match, find_snapshot, load_network

if TYPE_CHECKING:
    import torch

    from data.dataset import ImageDataset
    from gan.checkpoint import Snapshot


class Encoded:
    """A VAE, some images of a dataset, and their codes: the middles of their posteriors."""

    def __init__(self, network: str, data: str, count: int, seed: int, grouped: bool = False) -> None:
        """Raises UserError for a network without an encoder, a dataset that does not fit, or too few images.

        grouped: as many random groups of one class each, which content is the same in.
        """
        import torch

        from data.dataset import ImageDataset
        from gan.parts import prepare_reals
        from gan.vae.groups import Grouped
        from gan.vae.model import VAE

        path = find_snapshot(network)
        self.snapshot: Snapshot = load_network(path)
        dataset = ImageDataset(data)
        level = check_match(path, self.snapshot, dataset)
        if not isinstance(self.snapshot.G, VAE):
            raise UserError(f"{network} is a {self.snapshot.config.model}, which has no encoder; give a VAE")
        self.G: VAE = self.snapshot.G
        if grouped and not isinstance(self.G.posterior, Grouped):
            raise UserError(f"{network} has no content apart from style; train with vae.posterior=grouped")
        order = np.random.RandomState(seed).permutation(len(dataset))
        indices = groups_of_classes(dataset, order, count, self.G.posterior.size) if grouped else order[:count]
        if len(indices) < (count * self.G.posterior.size if grouped else count):
            raise UserError(f"{data} has {len(dataset)} images, too few; lower --images")
        self.pixels = dataset.read(indices, level)
        x = prepare_reals(torch.from_numpy(self.pixels).to(self.G.log_scale.device), None, 1.0, self.G)
        self.labels = None
        if self.G.classes and dataset.labels is not None:
            self.labels = torch.from_numpy(dataset.labels[indices]).to(x.device)
        self.codes = self.G.encode(x, self.labels)  # [n, d]

    def decode(self, codes: "torch.Tensor", labels: "torch.Tensor | None" = None) -> np.ndarray:
        """Images of codes [n, d]: uint8 [n, H, W, C]."""
        from gan.sampling import generate, to_uint8

        return to_uint8(generate(self.G, codes, labels, stage=self.snapshot.stage, alpha=1.0))


def groups_of_classes(dataset: "ImageDataset", order: np.ndarray, count: int, size: int) -> np.ndarray:
    """`count` groups of `size` records of one class each, of the classes in turn: int64 [count * size]."""
    if dataset.labels is None:
        raise UserError(f"{dataset.path} has no labels, which make groups")
    labels = dataset.labels[order]
    pools = [order[labels == label] for label in np.unique(labels)]
    groups = [pool[turn * size :][:size] for turn in range(count) for pool in pools]
    whole = [group for group in groups if len(group) == size][:count]
    return np.concatenate([*whole, order[:0]])


def reconstructions(encoded: Encoded) -> np.ndarray:
    """Each image, and beside it what the decoder makes of its code: uint8 [2 n, H, W, C]."""
    made = encoded.decode(encoded.codes, encoded.labels)
    return np.stack([encoded.pixels, made], 1).reshape(-1, *made.shape[1:])


def interpolations(encoded: Encoded, steps: int) -> np.ndarray:
    """For each pair of images a row from the one to the other: the image, `steps` images of codes on the straight line
    between theirs, the other image. uint8 [n / 2 * (steps + 2), H, W, C]."""
    import torch

    weights = torch.linspace(0, 1, steps, device=encoded.codes.device).view(1, -1, 1)
    first, last = encoded.codes[0::2, None], encoded.codes[1::2, None]
    labels = None if encoded.labels is None else encoded.labels[0::2].repeat_interleave(steps)
    made = encoded.decode(torch.lerp(first, last, weights).flatten(0, 1), labels)
    rows = made.reshape(-1, steps, *made.shape[1:])
    ends = encoded.pixels[0::2, None], encoded.pixels[1::2, None]
    return np.concatenate([ends[0], rows, ends[1]], 1).reshape(-1, *made.shape[1:])


def swaps(encoded: Encoded) -> np.ndarray:
    """A table: each row has the content of one group, each column the style of one image, which heads it. The first
    image of a row is of its group: uint8 [(n + 1)², H, W, C]."""
    import torch

    posterior = encoded.G.posterior
    codes = encoded.codes[:: posterior.size]
    heads = encoded.pixels[:: posterior.size]
    n, content = len(codes), posterior.content
    mixed = torch.cat(
        [codes[:, None, :content].expand(n, n, -1), codes[None, :, content:].expand(n, n, -1)], -1
    ).flatten(0, 1)
    made = encoded.decode(mixed).reshape(n, n, *heads.shape[1:])
    table = np.zeros((n + 1, n + 1, *heads.shape[1:]), np.uint8)
    table[0, 1:] = heads
    table[1:, 0] = heads
    table[1:, 1:] = made
    return table.reshape(-1, *heads.shape[1:])


def save_table(images: np.ndarray, columns: int, output: Path, scale: int | None) -> tuple[int, int]:
    """Write images row by row. -> (width, height) in pixels."""
    from gan.sampling import tile
    from launch.pictures import enlarge, save_png

    picture = enlarge(tile(images, columns), scale)
    save_png(picture, output)
    return picture.shape[1], picture.shape[0]
