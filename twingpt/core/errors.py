"""The errors that users are meant to see."""


class UserError(Exception):
    """A mistake the user can mend, said in one sentence: what, where, and what to do instead.

    The command line prints it without a traceback and exits with code 2.
    """


class OutOfMemoryError(UserError):
    """A device had no memory left for what was asked of it; a backend raises it for its framework's own."""
