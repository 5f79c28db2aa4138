"""Writing a dataset file so that it can be killed at any moment and continued.

The file is built beside its destination as `.part` and renamed when everything is on disk. Each commit is synced and
brings, besides images, what it takes to go on after it; these records go with the last commit:

    b"build"             JSON and CRC: the settings, how many items of the source are dealt with, how many are stored,
                         what was done to colors, the state of the content hash, the number of commits
    b"build/CCCCCCCCCC"  JSON and CRC: what commit C added to the labels and to the skipped images

The part is opened anew for each commit, so that whatever LMDB does next depends on the file alone: a build that was
killed and continued ends with the same bytes as one that was not.
"""

import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np

from data.encodings import ContentHash, for_key, with_crc, without_crc
from data.errors import DataError, Interrupted
from data.store import LABELS, MANIFEST, VERSION, Manifest, image_key, open_checked, part_path

BATCH_BYTES = 64 << 20  # a commit: about so many bytes of values, which LMDB holds in memory until then
MAP_ROOM = 4 * BATCH_BYTES  # what LMDB may take for a batch; only address space
BUILD = b"build"

StoredLabel = int | list[float] | None


class Skipped(NamedTuple):
    """An image of the source that is left out."""

    position: int  # in the source
    name: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what is particular to one image."""
        return self.reason.split(":")[0]


class StoreWriter:
    """Builds a dataset file from items in the order of the source: `add` them, then `finish`.

    If the part of an interrupted build with the same `settings` (any JSON) is there, it goes on from `consumed` items,
    in that build's mode; `say` tells of it. Leaving the `with` block by an error keeps a part that holds a commit, if
    the error is no DataError or an Interrupted one, and else leaves nothing. `largest`: about the bytes of the largest
    image, or of all labels.
    """

    def __init__(
        self,
        path: Path,
        settings: Any,
        mode: str,
        say: Callable[[str], None] = lambda line: None,
        largest: int = 0,
    ) -> None:
        self.path = path
        self.part = part_path(path)
        self.largest = largest
        self.settings = json.loads(json.dumps([VERSION, settings]))
        self._env: Any = None
        self._transaction: Any = None
        self._published = False
        self._made = [folder for folder in path.absolute().parents if not folder.exists()]  # innermost first
        self._begin_anew(mode)
        with self._explained():
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.file = lock(self.part)
        try:
            check_new(path)  # once more: another build may have ended before we held the lock
            if os.fstat(self.file).st_size:
                self._resume(say)
        except BaseException:
            self._discard()
            raise

    def _begin_anew(self, mode: str) -> None:
        self.mode = mode
        self.consumed = 0
        self.count = 0
        self.commits = 0
        self.labels: list[StoredLabel] = []
        self.skipped: list[Skipped] = []
        self.color_changes: Counter[str] = Counter()
        self._hash = ContentHash()
        self._waiting = 0  # bytes since the last commit
        self._pages = 0  # that the part uses
        self._noted = (0, 0)  # labels and skipped images that earlier commits hold

    def restart(self, mode: str) -> None:
        """Forget all that was written and begin anew in another mode."""
        self._close()
        os.ftruncate(self.file, 0)
        self._begin_anew(mode)

    def _resume(self, say: Callable[[str], None]) -> None:
        """Take over what the part holds, or empty it if that is another build or none."""
        import lmdb

        state = finished = None
        try:
            env = open_checked(self.part)
        except DataError:
            os.ftruncate(self.file, 0)  # killed before its first commit, or damaged
            return
        try:
            with env.begin() as transaction:
                self._pages = env.info()["last_pgno"] + 1
                state = transaction.get(BUILD)
                finished = transaction.get(MANIFEST)  # and not renamed: nothing in it says any longer what it is of
                if state:
                    self._restore(json.loads(without_crc(state)), transaction)
            page = env.stat()["psize"]
        except (lmdb.Error, ValueError, KeyError, TypeError, RecursionError):
            self._begin_anew(self.mode)
        finally:
            env.close()
        if self.commits:
            say(f"going on with {self.part}: {self.consumed} images of the source are done")
            os.ftruncate(self.file, self._pages * page)  # without what the killed build wrote but did not commit
        else:
            if state or finished:
                say(f"{self.part} is of another source or of other settings, or damaged: starting anew")
            self.restart(self.mode)

    def _restore(self, state: dict[str, Any], transaction: Any) -> None:
        if state["settings"] != self.settings:
            return
        for commit in range(state["commits"]):
            journal = json.loads(without_crc(transaction.get(_journal_key(commit))))
            self.labels += journal["labels"]
            self.skipped += [Skipped(*fields) for fields in journal["skipped"]]
        self._noted = len(self.labels), len(self.skipped)
        self._hash = ContentHash(bytes.fromhex(state["hash"]))
        self.mode = state["mode"]
        self.consumed = state["consumed"]
        self.count = state["count"]
        self.color_changes = Counter(state["color_changes"])
        self.commits = state["commits"]

    def add(
        self,
        consumed: int,
        levels: Sequence[int],
        values: Sequence[Sequence[bytes | memoryview]],
        digests: Sequence[bytes],
        labels: Sequence[StoredLabel] = (),
        skipped: Sequence[Skipped] = (),
        color_changes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Store images [n], each a value with CRC for every level, and skip others: in all `consumed` items more."""
        keys = [
            (image_key(level, self.count + index), image[place])
            for place, level in enumerate(levels)
            for index, image in enumerate(values)
        ]
        records = [(key, for_key(key, value)) for key, value in keys]
        size = sum(len(value) for _, value in records)
        with self._explained():
            self._begin(size)
            self._transaction.cursor().putmulti(records)
        for digest in digests:
            self._hash.add(digest)
        self.labels += labels
        self.skipped += skipped
        self.color_changes.update(color_changes)
        self.count += len(values)
        self.consumed += consumed
        self._waiting += size
        if self._waiting >= BATCH_BYTES:
            self._commit_progress()

    def _begin(self, extra: int) -> None:
        """A write transaction with room for a batch and `extra` bytes, if there is none yet."""
        import lmdb

        if self._transaction is None:
            room = self._pages * os.sysconf("SC_PAGESIZE") + MAP_ROOM + 4 * extra
            if self.largest > BATCH_BYTES:  # not always, because LMDB notes the room in the file
                room += 8 * self.largest
            # The flock on the part keeps other writers out, so LMDB needs no lock file.
            self._env = lmdb.open(os.fsencode(self.part), subdir=False, lock=False, map_size=room, readahead=False)
            self._transaction = self._env.begin(write=True)

    def _commit_progress(self) -> None:
        labels, skipped = self._noted
        journal = {"labels": self.labels[labels:], "skipped": self.skipped[skipped:]}
        state = {
            "settings": self.settings,
            "mode": self.mode,
            "consumed": self.consumed,
            "count": self.count,
            "color_changes": self.color_changes,
            "hash": self._hash.state.hex(),
            "commits": self.commits + 1,
        }
        with self._explained():
            self._transaction.put(_journal_key(self.commits), with_crc(json.dumps(journal).encode()))
            self._transaction.put(BUILD, with_crc(json.dumps(state).encode()))
            self._commit()
        self.commits += 1
        self._noted = (len(self.labels), len(self.skipped))
        self._waiting = 0

    def _commit(self) -> None:
        self._transaction.commit()
        self._pages = self._env.info()["last_pgno"] + 1
        self._close()

    def _close(self) -> None:
        if self._transaction is not None:
            self._transaction.abort()  # nothing, once it is committed
            self._env.close()
            self._transaction = self._env = None

    def finish(self, **fields: Any) -> Manifest:
        """Write labels and manifest (`fields` are those that only the caller knows) and put the file in its place."""
        import lmdb

        stored = b""
        if fields["label_dim"] is not None:
            stored = np.array(self.labels, "<f4").reshape(self.count, fields["label_dim"]).tobytes()
        elif fields["classes"] is not None:
            stored = np.array(self.labels, "<i4").tobytes()
        manifest = Manifest(
            count=self.count,
            content_hash=self._hash.finish(stored),
            skipped=dict(Counter(one.kind for one in self.skipped)),
            color_changes=dict(sorted(self.color_changes.items())),
            skipped_positions=tuple(one.position for one in self.skipped),
            lmdb=".".join(map(str, lmdb.version())),
            **fields,
        )
        with self._explained():
            self._begin(len(stored))
            for key in [BUILD, *map(_journal_key, range(self.commits))]:
                self._transaction.delete(key)
            if fields["label_dim"] is not None or fields["classes"] is not None:
                self._transaction.put(LABELS, for_key(LABELS, with_crc(stored)))
            self._transaction.put(MANIFEST, with_crc(manifest.to_json().encode()))
            self._commit()
        self._publish()
        return manifest

    def _publish(self) -> None:
        """Put the part, now complete, in its place."""
        with self._explained():
            os.ftruncate(self.file, self._pages * os.sysconf("SC_PAGESIZE"))
            os.fsync(self.file)
            os.replace(self.part, self.path)
            self._published = True
            folder = os.open(self.path.absolute().parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the disk and LMDB raise while writing into an error of one line."""
        import lmdb

        try:
            yield
        except (lmdb.Error, OSError) as error:
            kept = f"; {self.part} keeps what is done: make room and run the same command again" if self.commits else ""
            raise Interrupted(
                f"cannot write {self.path}: {error} (is the disk full, or the folder read-only?){kept}"
            ) from error

    def _discard(self) -> None:
        os.unlink(self.part)
        os.close(self.file)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._close()
        wrong_input = isinstance(error, DataError) and not isinstance(error, Interrupted)
        if not self._published and (wrong_input or not self.commits):
            self._discard()
        else:
            os.close(self.file)


def _journal_key(commit: int) -> bytes:
    return BUILD + b"/%010d" % commit


def check_new(path: Path) -> None:
    """DataError if a dataset cannot be made at `path`: something is there, or the name is too long."""
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder: name a file to write, such as {path / 'data.lmdb'}")
    if os.path.exists(path):
        raise DataError(f"{path} exists: remove it first, or choose another name")
    try:
        part_path(path).lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"the name of {path} is too long for a file and its .part: choose another name") from error


def lock(part: Path) -> int:
    """The file `part`, open, made if need be, and locked; DataError if another process has it."""
    file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The build that held the lock before us may just have renamed the file we opened.
        if not part.exists() or not os.path.samestat(os.fstat(file), part.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(file)
        raise DataError(f"{part} is being written by another process: wait for it, or choose another name") from None
    return file
