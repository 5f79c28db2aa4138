"""Writing files to the paths that a command's user gave."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gan.errors import UserError
from gan.files import replacing


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` when the block ends, and removed when the block fails.

    Missing folders are made. Raises UserError if the system refuses to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
