"""Who else may write the folder of compiled kernels? What lies in it is run, so it must be this user's alone."""

import grp
import os
import pwd
import stat
from pathlib import Path

from ops.toolchain import BuildError

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_owner(path: Path, above: Path | None = None) -> None:
    """Raises BuildError, with the reason, if another user than this one and root may have changed what is in a folder.

    path: a folder, or a file in it, that this project makes. above: the folder, made by the user, in which the project
    makes its own. It may be a link, and one like /tmp, where all may make files but not remove those of others. Every
    part from `path` up to `above` is looked at. Raises FileNotFoundError if `path` does not exist.
    """
    if above is not None:
        for part in (path, *path.parents):
            if part == above:
                break
            _check_part(part, part.lstat(), sticky_will_do=False)
        _check_part(above, above.stat(), sticky_will_do=True)
    else:
        _check_part(path, path.lstat(), sticky_will_do=False)


def close_to_others(path: Path) -> None:
    """Take the right to write a file from all but its owner, whatever the umask was."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)


def _check_part(path: Path, about: os.stat_result, sticky_will_do: bool) -> None:
    remedy = "set SADDLE_CACHE to a folder of your own"
    if about.st_uid not in (0, os.getuid()):
        raise BuildError(f"{path} belongs to {_name(about.st_uid)}, who could put any code there: {remedy}")
    if stat.S_ISLNK(about.st_mode):
        raise BuildError(f"{path} is a link: {remedy}")
    others = about.st_mode & OTHERS
    if others == stat.S_IWGRP and _is_private(about.st_gid):
        return
    if others and not (sticky_will_do and about.st_mode & stat.S_ISVTX):
        raise BuildError(f"others may write {path}, and could put any code there: remove it, or {remedy}")


def _is_private(group: int) -> bool:
    """Is this user alone in a group of the same name? Such systems let a user's groups write by default."""
    try:
        user = pwd.getpwuid(os.getuid())
        entry = grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
