"""Files that a command writes where its user asked for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gan.errors import UserError
from gan.files import replacing


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and is removed when it fails.

    Missing folders are made. UserError says in one line what the system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
