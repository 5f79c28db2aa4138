"""Names of files: which are hidden or unsafe, and how they are shown."""

from pathlib import PureWindowsPath


def hidden(name: str) -> bool:
    """Whether a file or a folder on the way to it is hidden, or is what macOS leaves in archives."""
    parts = name.replace("\\", "/").split("/")
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in parts)


def unsafe(name: str) -> bool:
    """Whether the name of an archive's member leads out of the folder it would be unpacked to."""
    name = name.replace("\\", "/")
    return name.startswith("/") or ".." in name.split("/") or bool(PureWindowsPath(name).drive)


def printable(name: str) -> str:
    """A name that any terminal and any encoding takes: control characters and undecodable bytes are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
