"""The one error that gan raises for what a user can mend."""


class UserError(ValueError):
    """Wrong configuration, checkpoint or environment. The message is one line: what, where, and how to mend it."""
