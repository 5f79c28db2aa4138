"""The one error that data raises for what a user can mend."""


class DataError(ValueError):
    """Wrong or damaged input. The message is one line: what, where, and how to mend it."""
