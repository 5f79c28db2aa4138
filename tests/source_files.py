"""What the tests of sources share: images to put into files, and how a source is compared."""

import io
import zipfile

import numpy as np
from PIL import Image


def pixels(count, size=(8, 6), channels=3, seed=0):
    """uint8 [count, H, W, C] noise; [count, H, W] for one channel."""
    shape = (count, *size) if channels == 1 else (count, *size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format)
    return stream.getvalue()


def as_read(items):
    """[(name, pixels as bytes or the reason, label as a list or number)] of items."""
    return [
        (item.name, item.image if isinstance(item.image, str) else np.asarray(item.image).tobytes(), plain(item.label))
        for item in items
    ]


def plain(label):
    return label.tolist() if isinstance(label, np.ndarray) else label


def check(source, images, labels, names=None):
    """A source has exactly these images and labels, in this order, from wherever its reading starts."""
    whole = as_read(source.read())
    assert len(whole) == source.count == len(images)
    assert [image for _, image, _ in whole] == [
        image if isinstance(image, str) else image.tobytes() for image in images
    ]
    assert [label for _, _, label in whole] == [plain(label) for label in labels]
    if names is not None:
        assert [name for name, _, _ in whole] == names
    check_slices(source, whole)


def check_slices(source, whole=None):
    whole = as_read(source.read()) if whole is None else whole
    count = source.count
    for start, stop in [(0, None), (0, 1), (1, count), (count // 2, None), (count - 1, count), (1, 3), (count, None)]:
        assert as_read(source.read(start, stop)) == whole[start:stop], (start, stop)
    # Two readers at once, as threads have them.
    assert [pair[0] for pair in zip(as_read(source.read()), as_read(source.read()), strict=True)] == whole
    first, second = source.read(), source.read(count - 1)
    assert [as_read([next(first)])[0], *as_read(second), *as_read(first)] == [whole[0], whole[-1], *whole[1:]]


def png(color="red", size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def make_folder(root, names, content=None):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if content is None else content)
    return str(root)


def make_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), png())
    return str(path)


def write_npz(path, images, labels):
    np.savez(path, images, labels)
    return str(path)


class Evil:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
