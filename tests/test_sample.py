"""gan.metrics.sample: what ranks see of a source, together, is what one process sees."""

import numpy as np
import pytest

from gan.metrics.features import FeatureNetwork
from gan.metrics.sample import Sample, Source, observe
from gan.ranks.distributed import Ranks

IMAGES = np.random.RandomState(0).randint(0, 256, (103, 64, 40, 3), dtype=np.uint8)
NETWORK = FeatureNetwork("first", "0" * 64, 0, "", 2, lambda images: images[:, 0, :2, 0].astype(np.float32))
SOURCE = Source(len(IMAGES), (64, 40, 3), 10, lambda rows: IMAGES[rows])


def test_images_are_shrunk_and_features_are_of_whole_ones():
    sample = observe(SOURCE, NETWORK, Ranks())
    assert sample.images.shape == (103, 32, 32, 3) and len(sample) == 103
    assert np.array_equal(sample.features, IMAGES[:, 0, :2, 0])
    assert abs(float(sample.images.mean()) - float(IMAGES.mean())) < 0.1


@pytest.mark.parametrize("world", [2, 3, 4, 20])
def test_each_image_is_seen_by_one_rank_which_leaves_zeros_for_the_others(world):
    """The sum over ranks, which single processes leave out, gives what one process sees."""
    alone = observe(SOURCE, NETWORK, Ranks())
    parts = [observe(SOURCE, NETWORK, Ranks(rank, world)) for rank in range(world)]
    assert np.array_equal(sum(part.features for part in parts), alone.features)
    assert np.array_equal(sum(part.images.astype(int) for part in parts), alone.images)
    assert max((part.features > 0).any(1).sum() for part in parts) <= 10 * -(-11 // world)


def test_rows_are_picked_from_all_parts():
    sample = Sample(IMAGES[:4], np.arange(8.0).reshape(4, 2), labels=np.arange(4)).pick(np.array([2, 2, 0]))
    assert sample.labels.tolist() == [2, 2, 0] and sample.probabilities is None and len(sample) == 3
    assert np.array_equal(sample.images, IMAGES[[2, 2, 0]])
