"""Datasets of vectors: what is read, what is refused, and a VAE that learns a known density."""

import json
import math

import numpy as np
import pytest
from test_scoring import only_run, saddle

from data import streams
from data.dataset import open_dataset
from data.errors import DataError
from gan.errors import UserError
from launch.evaluate import main as evaluate
from launch.generate import main as generate

RANDOM = np.random.default_rng(0)


def test_rows_and_labels_are_read(tmp_path):
    rows = RANDOM.normal(size=(7, 3))
    np.savez(tmp_path / "v.npz", x=rows, y=np.arange(7) % 2)
    dataset = open_dataset(tmp_path / "v.npz")
    assert len(dataset) == 7 and dataset.shape(0) == (1, 3, 1) and dataset.manifest.classes == ("0", "1")
    read = dataset.read(np.array([5, 2]), 0)
    assert read.dtype == np.float32 and np.array_equal(read[:, 0, :, 0], rows[[5, 2]].astype(np.float32))
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


BAD = {
    "x of vectors": {"y": np.zeros(3)},
    r"float64 \[3\]": {"x": np.zeros(3)},
    "some are not finite": {"x": np.array([[1.0, math.nan]])},
    "one per vector": {"x": np.zeros((3, 2)), "y": np.zeros(2, int)},
    "whole numbers": {"x": np.zeros((3, 2)), "y": np.array([0, 1, -1])},
    "from 0 to 1048575": {"x": np.zeros((3, 2)), "y": np.array([0, 1, 1 << 20])},
    "numbers from 0": {"x": np.zeros((3, 2)), "y": np.array([0, 1, (1 << 63) + 5], np.uint64)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_set_of_vectors_is_refused(message, tmp_path):
    np.savez(tmp_path / "v.npz", **BAD[message])
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "v.npz")


def damage_packed(content):
    content[60:400] = bytes(340)


def say_encrypted(content):
    content[content.find(b"PK\1\2") + 8] |= 1


def say_another_method(content):
    content[content.find(b"PK\1\2") + 10] = 99


@pytest.mark.parametrize("damage", [damage_packed, say_encrypted, say_another_method, bytearray.clear])
def test_a_damaged_archive_is_one_line(damage, tmp_path):
    np.savez_compressed(tmp_path / "v.npz", x=RANDOM.normal(size=(100, 8)), y=np.arange(100) % 3)
    content = bytearray((tmp_path / "v.npz").read_bytes())
    damage(content)
    (tmp_path / "v.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"v.npz (is refused or damaged: .|is packed by another)") as error:
        open_dataset(tmp_path / "v.npz")
    assert "\n" not in str(error.value)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_ARRAY", 1 << 16)
    np.savez_compressed(tmp_path / "v.npz", x=np.zeros((1000, 100)))
    with pytest.raises(DataError, match="65536 are the limit"):
        open_dataset(tmp_path / "v.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "v.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="is refused or damaged"):
        open_dataset(tmp_path / "v.npz")
    with pytest.raises(DataError, match="no file"):
        open_dataset(tmp_path / "w.npz")


def test_a_vae_learns_a_gaussian_and_tells_its_likelihood(tmp_path, monkeypatch, capfd):
    """x = W z + noise: the exact mean of log p(x) is known."""
    W = np.array([[1.0, 0.2], [0.3, -0.8], [0.5, 0.5], [-0.4, 0.6]])
    rows = RANDOM.normal(size=(4000, 2)) @ W.T + 0.3 * RANDOM.normal(size=(4000, 4))
    np.savez(tmp_path / "v.npz", x=rows)
    covariance = W @ W.T + 0.09 * np.eye(4)
    quadratic = np.einsum("ni,ij,nj->n", rows[:500], np.linalg.inv(covariance), rows[:500])
    exact = -0.5 * (quadratic.mean() + np.linalg.slogdet(2 * np.pi * covariance)[1])
    values = ["vae.hidden=[16]", "vae.likelihood=gaussian", "vae.binarize=0", "network.z_dim=2", "optimizer.g_lr=0.01"]
    flags = ["--preset=vae-dense", "--batch=32", "--kimg=30", "--tick=15", *(f"--set={value}" for value in values)]
    command = [f"--data={tmp_path / 'v.npz'}", f"--outdir={tmp_path / 'out'}", *flags]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path / "out")
    assert not list(run.glob("*.png"))
    with pytest.raises(UserError, match="makes vectors, of which there are no pictures"):
        generate.main(["grid", f"--network={run}", f"--output={tmp_path / 'x.png'}"], standalone_mode=False)
    np.savez(tmp_path / "test.npz", x=rows[:500])
    out = tmp_path / "rows.json"
    arguments = [f"--network={run}", f"--data={tmp_path / 'test.npz'}", "--likelihood=iwae:draws=200", f"--json={out}"]
    evaluate.main(arguments, standalone_mode=False)
    (row,) = json.loads(out.read_text())
    assert row["dataset_hash"] == open_dataset(tmp_path / "test.npz").manifest.content_hash and row["reals"] == 500
    found = float(row["log p(x), nats"])
    assert exact - 0.15 < found < exact + 0.1


def test_a_gan_refuses_vectors(tmp_path, monkeypatch, capfd):
    np.savez(tmp_path / "v.npz", x=RANDOM.normal(size=(64, 3)))
    assert saddle(monkeypatch, f"--data={tmp_path / 'v.npz'}", f"--outdir={tmp_path}") == 2
    assert "train a VAE of fully connected layers" in capfd.readouterr().err
