"""The errors that users see."""


class UserError(Exception):
    """A mistake that the user can mend, in one sentence: what, where, and what to do instead.

    The command line prints it without a traceback and exits with code 2.
    """
