"""What gan raises on purpose: for what a user can mend, and for a rank left alone by another."""


class UserError(ValueError):
    """Wrong configuration, checkpoint or environment. The message is one line: what, where, and how to mend it."""


class PeerError(RuntimeError):
    """This rank cannot go on because of another one. The message is one line: which rank, where, and at which step."""


class EverywhereError(UserError):
    """A UserError that every rank raises at once, so that one of them tells it and all end in order."""
