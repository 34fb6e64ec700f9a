"""The one exception that stands for a user's mistake, and what others said, in one line."""


class UserError(Exception):
    """A mistake the user can mend: the entry point prints it as one line and exits with status 2.

    The message names the key or file, the value found, what was expected and what to do next.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to its first line; the kind of error where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
