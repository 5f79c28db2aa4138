"""`python -m launch.benchmark NAME` is `saddle benchmark NAME`."""

from launch.benchmark import main
from launch.cli import run

run(main, "saddle benchmark")
