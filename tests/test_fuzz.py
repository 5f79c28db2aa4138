"""Changed copies of every file that the commands read: the right result, or one line that refuses it. Never a
traceback, a signal, a hang, or another result without a word."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked
from snapshots import write_snapshot
from source_files import encoded, pixels
from stores import build

from data.dataset import ImageDataset
from data.encodings import with_crc
from data.errors import DataError
from data.prepare import prepare
from data.store import MANIFEST, Manifest
from data.verify import verify
from gan.checkpoint import load_snapshot, load_state, newest_state, save_state
from gan.config import settings
from gan.errors import UserError
from gan.run.directories import _read_options
from launch.settings import read_config

pytestmark = pytest.mark.slow
SECONDS = 20  # of one use, on a busy machine
BATCH = 25  # changes that one forked process makes

Change = Callable[[random.Random, bytes], bytes]
Use = Callable[[Path], Any]  # what it gives is compared with what it gave before the file was changed


def change_bytes(draw: random.Random, content: bytes) -> bytes:
    """A bit, a run of zeros or of noise, a part left out, put in twice or moved, or the end cut off."""
    changed = bytearray(content)
    start = draw.randrange(len(changed)) if changed else 0
    length = min(draw.choice((1, 2, 8, 64, 4096)), len(changed) - start)
    part = changed[start : start + length]
    kind = draw.randrange(7)
    if kind <= 1 and part:
        changed[start] ^= 1 << draw.randrange(8)
    elif kind == 2:
        changed[start : start + length] = bytes(length)
    elif kind == 3:
        changed[start : start + length] = draw.randbytes(length)
    elif kind == 4:
        del changed[start : start + length]
    elif kind == 5:
        place = draw.randrange(len(changed) + 1)
        changed[place:place] = part
    elif kind == 6:
        del changed[start:]
    return bytes(changed)


VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    1e30,
    10**30,
    1 << 40,
    "",
    "a",
    "../../x",
    "\x1b[2J",
    [],
    [[]],
    {},
    [1],
    {"a": 1},
)


def change_value(draw: random.Random, value: Any) -> Any:
    """JSON with one value, at any depth, replaced, removed, or given another name."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        kind = draw.randrange(8)
        rest = {name: one for name, one in value.items() if name != key}
        if kind == 0:
            return rest
        return rest | {f"{key}x" if kind == 1 else key: value[key] if kind == 1 else change_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], change_value(draw, value[place]), *value[place + 1 :]]
    return draw.choice(VALUES)


def change_json(draw: random.Random, text: bytes) -> bytes:
    """The same for a text, or any of `change_bytes`, or far too many brackets."""
    kind = draw.randrange(10)
    if kind == 0:
        return b"[" * 50_000 + b"]" * draw.choice((0, 50_000))
    if kind <= 3:
        return change_bytes(draw, text)
    return json.dumps(change_value(draw, json.loads(text))).encode()


def outcomes(count: int, once: Callable[[random.Random], str], name: str) -> Counter[str]:
    """What came of so many changes, each by a seed of its own, in forked processes."""
    total: Counter[str] = Counter()

    def batch(first: int) -> dict[str, str]:
        return {str(seed): once(random.Random(f"{name} {seed}")) for seed in range(first, min(first + BATCH, count))}

    for first in range(0, count, BATCH):
        found = forked(lambda first=first: batch(first), SECONDS * BATCH)
        assert isinstance(found, dict), f"{name}, one of the seeds from {first} on: {found}"
        for seed, result in found.items():
            assert result in ("same", "refused"), f"{name}, seed {seed}: {result}"
        total.update(found.values())
    print(f"{name}: {dict(total)}")
    return total


def attempt(use: Use, path: Path, right: Any) -> str:
    """ "same", "refused" by one line, or what else happened."""
    try:
        result = use(path)
    except (UserError, DataError) as error:
        line = str(error)
        return "refused" if "\n" not in line and len(line) < 2000 else f"not one short line: {line[:500]}"
    return "same" if result == right else f"another result: {str(result)[:500]}"


def fuzz_file(
    path: Path, use: Use, count: int, change: Callable[[random.Random, bytes], bytes] = change_bytes
) -> Counter[str]:
    content = path.read_bytes()
    right = use(path)

    def once(draw: random.Random) -> str:
        path.unlink()  # a file of its own: nothing may remember the one before
        path.write_bytes(change(draw, content))
        return attempt(use, path, right)

    return outcomes(count, once, f"{use.__name__} {path.name}")


def use_snapshot(path: Path) -> Any:
    snapshot = load_snapshot(path)
    G = snapshot.G
    with torch.no_grad():
        image = G(torch.ones(1, G.z_dim), snapshot.stage, snapshot.alpha, torch.zeros(1, dtype=torch.int64))
    about = (snapshot.config, snapshot.images, snapshot.stage, snapshot.alpha, snapshot.images_seen)
    return image.numpy().tobytes(), about


def test_snapshots(tmp_path):
    path = write_snapshot(tmp_path / "a.safetensors", cond=True)
    assert fuzz_file(path, use_snapshot, 300)["refused"] > 250


def test_metadata_of_snapshots(tmp_path):
    path = write_snapshot(tmp_path / "a.safetensors", cond=True)
    length = int.from_bytes(path.read_bytes()[:8], "little")

    def change(draw: random.Random, content: bytes) -> bytes:
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"]["saddle"] = change_json(draw, header["__metadata__"]["saddle"].encode()).decode("latin1")
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    assert fuzz_file(path, use_snapshot, 300, change)["refused"] > 250


TENSORS = {"a": torch.arange(600.0).reshape(20, 30), "b": torch.ones(4)}
LAYOUT = {"a": ("F32", (20, 30)), "b": ("F32", (4,))}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_states(tmp_path, name):
    """The state before is used, or the newest with all that it held."""
    for seen in (400, 800):
        save_state(tmp_path, seen, {"a": TENSORS["a"] * seen, "b": TENSORS["b"]}, {"threads": 1}, keep=2)

    def use_state(path: Path) -> Any:
        newest, passed = newest_state(path.parent.parent, LAYOUT, 16)
        assert newest is not None and not any("\n" in line for line in passed)
        tensors, about = load_state(newest, LAYOUT, 16)
        seen = int(newest.name[-10:])
        return about == {"threads": 1, "images_seen": seen} and torch.equal(tensors["a"], TENSORS["a"] * seen)

    change = change_bytes if name.endswith("safetensors") else change_json
    fuzz_file(tmp_path / "training-state-0000000800" / name, use_state, 100, change)


def use_dataset(path: Path) -> Any:
    dataset = ImageDataset(path)
    read = [dataset.read(np.arange(len(dataset)), level, check=True).tobytes() for level in dataset.manifest.levels]
    return read, dataset.labels.tolist()


def test_datasets(tmp_path):
    build(tmp_path / "x.lmdb")
    fuzz_file(tmp_path / "x.lmdb", use_dataset, 400)


def test_datasets_that_are_verified(tmp_path):
    build(tmp_path / "x.lmdb")
    right = use_dataset(tmp_path / "x.lmdb")

    def use(path: Path) -> Any:
        return verify(path) != [] or use_dataset(path) == right

    fuzz_file(tmp_path / "x.lmdb", use, 100)


def test_manifests(tmp_path):
    """Only those with right values are taken; all text of those can be printed."""
    text = build(tmp_path / "x.lmdb").to_json().encode()

    def once(draw: random.Random) -> str:
        try:
            manifest = Manifest.from_json(change_json(draw, text))
        except (ValueError, KeyError, TypeError):
            return "refused"
        shown = json.dumps(manifest.to_json())
        good = Manifest.from_json(manifest.to_json()) == manifest and shown.isprintable() and manifest.count > 0
        return "same" if good and len(manifest.content_hash) == 64 else "wrong"

    outcomes(400, once, "manifests")


def test_manifests_in_datasets(tmp_path):
    import lmdb

    path = tmp_path / "x.lmdb"
    text = build(path).to_json().encode()
    content = path.read_bytes()

    def once(draw: random.Random) -> str:
        path.unlink()
        path.write_bytes(content)
        with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26) as env, env.begin(write=True) as changing:
            changing.put(MANIFEST, with_crc(change_json(draw, text)))
        result = attempt(use_dataset, path, None)
        return "same" if result.startswith("another result") else result  # the manifest is right for what it says

    outcomes(100, once, "manifests in datasets")


def test_options(tmp_path):
    options = {"trajectory_hash": "x", "config": {"batch": 16, "run": {"kimg": 1.0}}, "images": {}, "schedule": {}}
    path = tmp_path / "training_options.json"

    def once(draw: random.Random) -> str:
        path.write_bytes(change_json(draw, json.dumps(options).encode()))
        _read_options(tmp_path)
        return "same"

    outcomes(100, once, "options")


WORDS = ["1", "-1", "0", "1e30", "nan", "inf", "true", "[]", "{}", "[1,2]", "''", "a", "1_0", "0x10", "1#2", "=", "\n"]
WORDS += ["[" * 5000, "x" * 300, "\x1b[2J", "1979-05-27"]


def test_settings():
    keys = sorted(settings())

    def once(draw: random.Random) -> str:
        assignments = [f"{draw.choice(keys)}={draw.choice(WORDS)}" for _ in range(draw.choice((1, 1, 2)))]
        return attempt(lambda _: read_config({"assignments": assignments, "preset": "default"}) and None, Path(), None)

    outcomes(300, once, "settings")


def test_presets(tmp_path):
    from launch.settings import PRESETS

    texts = [preset.read_bytes() for preset in sorted(PRESETS.glob("*.toml"))]
    path = tmp_path / "a.toml"

    def once(draw: random.Random) -> str:
        path.write_bytes(change_bytes(draw, draw.choice(texts)))
        return attempt(lambda _: read_config({"assignments": (), "preset": str(path)}) and None, path, None)

    outcomes(200, once, "presets")


def archive(suffix: str, path: Path) -> Path:
    """Six images in two folders, as an archive."""
    folder = path / "source"
    for index, image in enumerate(pixels(6)):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "ab"[index % 2] / f"{index}.png").write_bytes(encoded(image))
    return Path(shutil.make_archive(str(path / "archive"), suffix, folder))


@pytest.mark.parametrize("suffix", ["zip", "tar", "gztar"])
def test_archives(tmp_path, suffix):
    """Every image of what is built is one of the archive's."""
    path = archive(suffix, tmp_path)
    right = {image.tobytes() for image in pixels(6)}

    def use_archive(path: Path) -> Any:
        dest = path.with_name("x.lmdb")
        dest.unlink(missing_ok=True)
        prepare(str(path), dest, resolution=(8, 6), base=(8, 6), workers=1)
        dataset = ImageDataset(dest)
        return {image.tobytes() for image in dataset.read(np.arange(len(dataset)), 0)} <= right

    fuzz_file(path, use_archive, 70)


def test_changes_are_found_out():
    """The fuzzer itself: what is no one line, no same result, or a signal is told."""

    def wrong(draw: random.Random) -> str:
        return attempt(lambda path: draw.random(), Path(), 2.0)

    with pytest.raises(AssertionError, match="another result"):
        outcomes(3, wrong, "wrong")
    with pytest.raises(AssertionError, match="died of SIGABRT"):
        outcomes(3, lambda draw: __import__("os").abort(), "abort")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        outcomes(3, lambda draw: str(1 / 0), "traceback")
    assert len({change_bytes(random.Random(seed), bytes(range(256))) for seed in range(100)}) > 90
