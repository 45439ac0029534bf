"""UserError: a mistake in a user's arguments, files or data. The scripts print it as one line, and
end with exit status 2.

Every other exception is a mistake in the code. It ends in a traceback to the line that holds the
mistake."""

import dis
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what a user has typed or in a user's file. The message says what is wrong, where
    it is, and what to do."""


@contextmanager
def user_file(path):
    """Enclose code that reads or writes a file that the user has named: an error of the disk or of
    safetensors becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {error}") from error


def read_text(path):
    """The text in a file that the user has named: UTF-8, with a byte order mark or without. Raises
    UserError."""
    try:
        with user_file(path):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None


@contextmanager
def refusals_of(*modules):
    """Enclose a call of these modules that reads a user's files: a refusal by one of the modules
    becomes a UserError.

    modules: "model", "rosa" or both. A refusal is a ValueError that comes from a `raise` statement
    in one of them. A ValueError that comes from any other line, such as int("3.5"), is a mistake in
    the modules' code and passes unchanged."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if not is_refusal(error, modules):
            raise
        raise UserError(str(error)) from error


def is_refusal(error, modules):
    """Whether a `raise` statement in the modules has raised an error, and the error that caused it,
    if there is one."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    frame = trace.tb_frame
    is_raise = frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    if not is_raise or frame.f_globals.get("__name__") not in modules:
        return False
    return error.__cause__ is None or is_refusal(error.__cause__, modules)
