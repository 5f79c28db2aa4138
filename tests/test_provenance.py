"""Where scores come from: what is kept beside them, and which of them may stand in one table."""

import json
from dataclasses import replace

import pytest

from gan.errors import UserError
from gan.metrics.intervals import Estimate
from gan.metrics.provenance import (
    Features,
    Provenance,
    check_comparable,
    figures_from_json,
    figures_to_json,
)
from gan.metrics.score import Score
from launch.scores import score_table

LITE = Features("lite0", "ab" * 32, 0, "bicubic")
NETWORK = Provenance(LITE, "c" * 64, (32, 32), 50_000, 10_000, 0, "d" * 64, {"torch": "2.13.0"})
OTHERS = {
    "features": replace(NETWORK, features=replace(LITE, sha256="ba" * 32)),
    "resize": replace(NETWORK, features=replace(LITE, side=299)),
    "dataset": replace(NETWORK, dataset_hash="e" * 64),
    "resolution": replace(NETWORK, size=(32, 64)),
    "reals": replace(NETWORK, reals=49_999),
    "samples": replace(NETWORK, samples=5000),
}


def test_provenance_and_figures_survive_a_file():
    text = json.dumps(NETWORK.to_json())
    assert Provenance.from_json(json.loads(text)) == NETWORK
    assert Provenance.from_json({**json.loads(text), "name": "more", "figures": {}}) == NETWORK
    reals = replace(NETWORK, snapshot_sha256=None)
    assert Provenance.from_json(json.loads(json.dumps(reals.to_json()))) == reals != NETWORK
    figures = {"fd-lite0": Estimate(2.0, 1.5, 2.5), "spread": Estimate(0.1, 0.1, 0.1)}
    assert figures_from_json(json.loads(json.dumps(figures_to_json(figures)))) == figures


@pytest.mark.parametrize("part", OTHERS)
def test_scores_that_differ_in_a_part_are_refused_and_named(part):
    assert NETWORK.key() == replace(NETWORK, snapshot_sha256="f" * 64, seed=3, versions={}).key()
    assert NETWORK.key() != OTHERS[part].key()
    with pytest.raises(UserError, match=rf"of a and b differ in {part} \(") as refused:
        check_comparable({"a": NETWORK, "b": OTHERS[part]})
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=f"differ in {part}"):
        score_table({n: Score(9, {}, {}, of) for n, of in (("a", NETWORK), ("b", OTHERS[part]))})


def test_rows_of_reals_have_counts_of_their_own():
    half = replace(NETWORK, snapshot_sha256=None, reals=25_000, samples=9_000)
    check_comparable({"a": NETWORK, "half": half, "b": replace(NETWORK, seed=1)})
    with pytest.raises(UserError, match="dataset"):
        check_comparable({"a": NETWORK, "half": replace(half, dataset_hash="0" * 64)})
    check_comparable({})


@pytest.mark.parametrize("part", ["features", "dataset_hash", "size", "reals", "snapshot_sha256"])
def test_a_row_without_provenance_is_refused_in_one_line(part):
    values = NETWORK.to_json()
    for row in ({k: v for k, v in values.items() if k != part}, {**values, part: 1.5}, [], None):
        with pytest.raises(UserError, match="without its provenance") as refused:
            Provenance.from_json(row)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [None, [], {"fd": 1}, {"fd": {"value": 1, "low": 0}}, {"fd": {"value": "x"}}])
def test_figures_that_are_none_are_refused(values):
    with pytest.raises(UserError, match="cannot be read"):
        figures_from_json(values)
