"""Names of files and classes: how they are compared, stored and shown, and which are hidden or unsafe."""

import unicodedata
from pathlib import PureWindowsPath


def composed(name: str) -> str:
    """A name in Unicode's form NFC: macOS stores `é` as two characters, and other systems as one."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A name that any terminal and any encoding takes: control characters and undecodable bytes are escaped."""
    if name.isprintable():
        return name
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def tidy(name: str) -> str:
    r"""The name of a file below its source as it is compared, stored and shown: give it the name as it was found.

    `\` becomes `/`, as Windows means it; `.` between `/` is dropped; it is composed and printable.
    """
    parts = name.replace("\\", "/").split("/")
    return printable(composed("/".join(part for part in parts if part != ".")))


def hidden(name: str) -> bool:
    """Whether a file or a folder on the way to it is hidden, or is what macOS leaves in archives."""
    parts = name.replace("\\", "/").split("/")
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in parts)


def unsafe(name: str) -> bool:
    """Whether the name of an archive's member leads out of the folder it would be unpacked to."""
    name = name.replace("\\", "/")
    return name.startswith("/") or ".." in name.split("/") or bool(PureWindowsPath(name).drive)
