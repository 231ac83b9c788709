"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what was given, told in one line: what it was, what is allowed, what to do.

    The command line prints the message and exits 2. Any other exception keeps its traceback.
    """


def one_line(error: object) -> str:
    """What an exception says, with every run of white space as one blank."""
    return " ".join(str(error).split())
