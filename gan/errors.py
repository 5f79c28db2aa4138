"""The errors that gan raises on purpose: one for what a user can mend, one for a rank that another one has failed."""


class UserError(ValueError):
    """Wrong configuration, checkpoint or environment. The message is one line: what, where, and how to mend it."""


class PeerError(RuntimeError):
    """This rank cannot go on because of another one. The message is one line: which rank, where, and at which step."""


class EverywhereError(UserError):
    """A UserError that every rank raises at once: only rank 0 prints it, and all ranks end in order."""
