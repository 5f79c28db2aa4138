"""launch/kept_classifier.py: what is read back is what was trained, by whichever process came first."""

import numpy as np
import pytest
import torch

from gan.errors import UserError
from gan.metrics.classifier import build_network, train_classifier
from launch.kept_classifier import keep


@pytest.fixture(scope="module")
def trained():
    random = np.random.RandomState(0)
    labels = np.arange(60) % 3
    images = (labels[:, None, None, None] * 80 + random.randint(0, 20, (60, 8, 8, 1))).astype(np.uint8)
    return train_classifier(images, labels, 3, steps=5), images


def never():
    raise AssertionError("trained again")


def test_what_was_trained_is_read_and_not_trained_again(trained, tmp_path):
    classifier, images = trained
    path = tmp_path / "features" / "a.safetensors"
    assert keep(path, build_network(1, 3), lambda: classifier) is classifier
    found = keep(path, build_network(1, 3), never)
    assert (found.classes, found.accuracy, found.held_out) == (3, classifier.accuracy, classifier.held_out)
    for mine, theirs in zip(found(images), classifier(images), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not any(p.requires_grad for p in found.network.parameters()) and not found.network.training


@pytest.mark.parametrize("damage", [b"", b"nonsense", "another network", "a tensor alone"])
def test_a_file_that_holds_another_network_is_refused(trained, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    keep(path, build_network(1, 3), lambda: trained[0])
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage == "a tensor alone":
        from safetensors.torch import save_file

        save_file(build_network(1, 3).state_dict(), path)
    with pytest.raises(UserError, match=r"holds no classifier of this dataset .*remove it"):
        keep(path, build_network(1, 4 if damage == "another network" else 3), never)


def test_nothing_is_left_of_a_training_that_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(RuntimeError):
        keep(path, build_network(1, 3), lambda: torch.zeros(2).reshape(3))
    assert not path.exists()
