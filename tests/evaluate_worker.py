"""`saddle evaluate`, run under torchrun by test_evaluate, with a classifier that is trained for a moment only."""

from functools import partial

import gan.metrics.classifier
from gan.metrics.classifier import train_classifier
from launch.cli import run
from launch.evaluate import main

if __name__ == "__main__":
    gan.metrics.classifier.train_classifier = partial(train_classifier, steps=60)
    run(main, "saddle evaluate")
