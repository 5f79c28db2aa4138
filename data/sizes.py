"""Sizes of images and of files, as people write and read them."""

import re

from data.errors import DataError

Size = tuple[int, int]  # (height, width)


def format_size(size: Size) -> str:
    """A size as HxW."""
    return f"{size[0]}x{size[1]}"


def parse_size(text: str) -> Size:
    """(height, width) of "64" or "64x128"; DataError for anything else."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,6}", side) and int(side) for side in sides):
        raise DataError(f"{text!r} is not a size: write one side, such as 64, or HEIGHTxWIDTH, such as 64x128")
    return int(sides[0]), int(sides[-1])


def format_megabytes(count: int) -> str:
    """A number of bytes in MB."""
    return f"{count / 1e6:.1f} MB"
