"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: the entry point prints it as one line and exits with status 2.

    The message names the key or file, the value found, what was expected and what to do next.
    """
