"""What is refused about arguments, files and data: the scripts print a UserError as one line, exit
status 2.

Every other exception is a mistake in the code. It ends in a traceback to the line that holds the
mistake."""

import dis
from contextlib import contextmanager

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what a user has typed or in a file. The message says what is wrong, where, and
    what to do."""


@contextmanager
def user_file(path):
    """Around the reading or writing of a file that a user has named: what the disk refuses becomes
    a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {error}") from error


@contextmanager
def refusals_of(*modules):
    """Around a call of a library that reads a user's files: what these modules refuse becomes a
    UserError.

    A refusal is a ValueError that comes from a `raise` statement in one of the modules, "model" or
    "rosa". A ValueError that comes from any other line, such as int("3.5"), is a mistake in their
    code and stays what it is."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if not is_refusal(error, modules):
            raise
        raise UserError(str(error)) from error


def is_refusal(error, modules):
    """Whether an error, and the one that it was made from if any, was raised by a statement in the
    modules."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    frame = trace.tb_frame
    is_raise = frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    if not is_raise or frame.f_globals.get("__name__") not in modules:
        return False
    return error.__cause__ is None or is_refusal(error.__cause__, modules)
