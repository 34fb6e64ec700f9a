"""The exception for users' mistakes, and errors of libraries in one line."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence


class UserError(Exception):
    """A mistake that the user can fix: the entry point prints it as one line and exits with status 2.

    The message names the key or file, the value found, what was expected and what to do next.
    """


@contextlib.contextmanager
def report_write_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns an OSError inside into one line: that `what`, such as a path, can't be written, why, and the remedy.

    Raises:
        UserError: something inside could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} can't be written ({error.strerror or first_line(error)}); {remedy}.") from error


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
