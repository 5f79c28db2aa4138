"""The errors that data raises for what a user can mend."""


class DataError(ValueError):
    """Wrong or damaged input. The message is one line: what, where, and how to mend it."""


class Interrupted(DataError):
    """A build that stopped for want of space or of a worker: the same command goes on from its last commit."""
