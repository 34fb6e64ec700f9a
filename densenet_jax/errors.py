"""The exception for users' mistakes, and errors of libraries in one line."""


class UserError(Exception):
    """A mistake that the user can fix: the entry point prints it as one line and exits with status 2.

    The message names the key or file, the value found, what was expected and what to do next.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
