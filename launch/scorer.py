"""The process beside a training that scores its snapshots (see `gan.run.scoring.Scorer`).

    python -m launch.scorer '{"data": ..., "metrics": ..., "features": ..., "samples": ...}'

It runs at low priority, in one thread, and trains a classifier or looks at the reals once, for the first snapshot.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from gan.errors import UserError
from launch.ranks import end_with_parent, environment
from launch.samples import load_network
from launch.scores import build_reference, check_scores, features_name, score_as_json

if TYPE_CHECKING:
    from data.dataset import Dataset
    from gan.checkpoint import Snapshot
    from gan.config import RunConfig
    from gan.metrics.score import Score
    from gan.run.scoring import Scorer
    from launch.scores import Reference

NICE = 10
SEED = 0  # the default of `saddle evaluate`, which then gives the same scores of snapshots of the last stage


def find_scorer(dataset: "Dataset", config: "RunConfig") -> "Scorer | None":
    """How the snapshots of a run are scored; None if no metrics are asked for.

    Raises UserError as `check_scores` does.
    """
    from gan.run.scoring import Scorer

    if config.metrics == "none":
        return None
    chosen, _ = check_scores(dataset, config.metrics, config.features, config.metric_samples)
    asked = {
        "data": str(dataset.path),
        "metrics": config.metrics,
        "features": config.features,
        "samples": config.metric_samples,
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if config.metric_device == "cpu" else {}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "launch.scorer", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(1) | {"OMP_NUM_THREADS": "1"} | hidden,
            process_group=0,  # a terminal's Ctrl-C reaches the run, which ends this process
        )

    features = features_name(config.features)
    return Scorer(tuple(metric.named(name, features) for name, metric in chosen.items()), start)


def answer(reference: "Reference", snapshot: "Snapshot", samples: int, floors: "Mapping[str, Score]") -> dict[str, Any]:
    """The scores of a snapshot, by metric, each with the same figures of real images."""
    score = reference.score_network(snapshot, samples)
    about = score_as_json(score, str(reference.dataset.path))
    features = reference.network.name
    rows = {}
    for name, metric in reference.metrics.items():
        beside = {
            floor: {"samples": row.samples, "figures": figures_of(row, name)}
            for floor, row in floors.items()
            if figures_of(row, name)
        }
        best = {"best": metric.named(metric.best, features), "higher": metric.higher}
        rows[metric.named(name, features)] = {**about, "figures": figures_of(score, name), **best, "floors": beside}
    return rows


def figures_of(score: "Score", metric: str) -> dict[str, dict[str, float]]:
    """The figures of one metric, as plain values."""
    from gan.metrics.provenance import figures_to_json

    return figures_to_json({figure: score.figures[figure] for figure in score.by_metric.get(metric, ())})


def main() -> None:
    """Answer each line of standard input."""
    end_with_parent()
    os.nice(NICE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from now on must not get between the answers
    from data.dataset import ImageDataset
    from gan.metrics.classifier import one_thread

    asked = json.loads(sys.argv[1])
    samples = asked["samples"]
    reference = None
    floors: dict[str, Score] = {}
    for line in sys.stdin:
        path = Path(line.removesuffix("\n"))
        try:
            with one_thread():
                snapshot = load_network(path)
                reference = reference or build_reference(
                    ImageDataset(asked["data"]),
                    snapshot.images.last,
                    SEED,
                    metrics=asked["metrics"],
                    features=asked["features"],
                    samples=samples,
                    say=lambda line: None,
                )
                floors = floors or reference.real_floors(samples)
                found = answer(reference, snapshot, samples, floors)
        except (UserError, DataError) as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
