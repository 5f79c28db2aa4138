"""Parts of a source for training and for tests: disjoint, complete, the same each time."""

import numpy as np
import pytest

from data.dataset import ImageDataset
from data.errors import DataError
from data.prepare import prepare
from data.repair import repair
from data.sources import open_source


def as_read(source):
    return {item.name: (item.image.tobytes(), int(item.label)) for item in source.read()}


def test_two_parts_make_the_whole_and_share_nothing():
    train, test = open_source("train:500:digits"), open_source("test:500:digits")
    assert (train.count, test.count) == (1297, 500)
    one, other = as_read(train), as_read(test)
    assert not set(one) & set(other)
    assert one | other == as_read(open_source("digits"))
    assert test.classes == open_source("digits").classes and test.name == "test:500:digits"
    labels = [label for _, label in other.values()]
    assert min(np.bincount(labels, minlength=10)) > 30  # of all classes, which those at the end would not be


def test_a_part_is_the_same_each_time_and_can_be_read_from_anywhere():
    part = open_source("test:40:digits", 30)
    names = [item.name for item in part.read()]
    assert names == [item.name for item in open_source("test:40:digits").read()][:30]
    assert [item.name for item in part.read(10, 12)] == names[10:12]
    assert names != [f"digit {index}" for index in range(30)]


def test_a_part_can_be_prepared_and_repaired(tmp_path):
    path = tmp_path / "test.lmdb"
    prepare("test:50:digits", path)
    assert len(ImageDataset(path)) == 50 and not repair("test:50:digits", path)


@pytest.mark.parametrize("source", ["test:0:digits", "train:1797:digits", "test:5:missing.zip"])
def test_what_cannot_be_divided(source):
    with pytest.raises(DataError, match=r"1797 images, of which from 1 to 1796|missing.zip does not exist"):
        open_source(source)
