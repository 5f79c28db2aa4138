"""The contestants of `saddle benchmark data`: ways of getting the next batch of the same images into memory."""

from collections.abc import Callable, Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.dataset import ImageDataset
from data.loader import load
from data.sampler import sample_indices

Call = Callable[[], Any]
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 1},
    "JPEG": {"quality": 95},
}  # of the folders that Pillow reads


def orders(length: int, batch: int) -> Iterator[np.ndarray]:
    """The indices of batch after batch, without end; computed beforehand, as they are not what is measured."""
    epochs = sample_indices(0, max(length // batch, 1) * batch, length, seed=0)
    return cycle(epochs.reshape(-1, batch))


def direct(dataset: ImageDataset, level: int, batch: int, check: bool = False) -> Call:
    """Shuffled records into one buffer."""
    turns = orders(len(dataset), batch)
    out = np.empty((batch, *dataset.shape(level)), np.uint8)
    return lambda: dataset.read(next(turns), level, check, out)


def loader(dataset: ImageDataset, level: int, batch: int, workers: int, batches: int) -> Call:
    """What training reads from: so many shuffled batches, by threads, into buffers in turn. Its threads begin and end
    with the call, so that nothing is read ahead while another contestant is timed. -> the last batch"""
    begin = count(0, batches * batch)

    def read() -> np.ndarray:
        first = next(begin)
        requests = ((first + k * batch, batch, level) for k in range(batches))
        for images, _ in load(dataset, requests, seed=0, workers=workers):
            last = images
        return last

    return read


def memcpy(images: np.ndarray, batch: int) -> Call:
    """A copy of as many bytes at once, from memory as large as the images."""
    out = np.empty((batch, *images.shape[1:]), np.uint8)
    turns = cycle([images[k : k + batch] for k in range(0, len(images) - batch + 1, batch)])
    return lambda: np.copyto(out, next(turns))


def write_folder(images: np.ndarray, folder: Path, kind: str) -> list[Path]:
    """Save uint8 images [N, H, W, C], C of 1 or 3, as files of a kind of FORMATS."""
    folder.mkdir()
    paths = [folder / f"{index:08d}.{kind.lower()}" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).save(path, **FORMATS[kind])
    return paths


def pillow(paths: list[Path], batch: int, floats: bool = False) -> Call:
    """Shuffled files, opened and decoded one by one; as floats: [C, H, W] in [-1, 1], as most image folders are read,
    else uint8 [H, W, C]."""
    turns = orders(len(paths), batch)

    def decode(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)

    def read() -> Any:
        images = (decode(paths[index]) for index in next(turns))
        if not floats:
            return np.stack(list(images))
        planes = (torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images)
        return torch.stack([(plane.float() / 255 - 0.5) / 0.5 for plane in planes])

    return read


def litdata(images: np.ndarray, folder: Path, batch: int) -> Call | None:
    """Raw arrays as litdata stores them, item after item and not even stacked; None where it is not installed."""
    try:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        return None
    writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
    for index, image in enumerate(images):
        writer[index] = image
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(folder), shuffle=False)

    def endless() -> Iterator[Any]:
        while True:
            yield from dataset

    items = endless()
    return lambda: list(islice(items, batch))
