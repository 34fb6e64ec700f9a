"""The exception for users' mistakes, and errors of libraries in one line."""

import importlib.util
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can fix: the entry point prints it as one line and exits with status 2.

    The message names the key or file, the value found, what was expected and what to do next.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_some(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names with commas between them, and ", ..." where there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def check_installed(what: str, modules: Sequence[str], install: str) -> None:
    """Checks that the optional libraries that `what` needs can be imported.

    Raises:
        UserError: some can't be; the message has the command that installs them.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}, not installed here: run `{install}`.")
