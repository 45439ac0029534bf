"""How scripts and commands are called: their help, the values of their options, one-line errors,
exit statuses.
A mistake ends in one line that says what to type instead, and `--help` fits on a screen.
Without it: argparse alone, and a traceback for a mistake.
"""

import argparse
import errno
import math
import os
import shlex
import signal
import sys
import textwrap
import traceback

from data.errors import UserError
from extras.checkpoints import NAMES
from extras.distributed import close_bars, died, gather, is_first, join_processes, processes
from extras.memory import out_of_memory, ran_out
from extras.source import is_library


class Stop(Exception):
    """Raised where a run has to end early: Stop(what happened), with an exit status. What the run
    has saved is whole."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def run_script(name, parse_args, main, arguments=None, last_sentence=None):
    """Call main(parse_args(arguments)), and see to every way in which it can end.

    arguments: the words of a command line; None stands for those of the process. A UserError ends
    in one line on stderr and exit status 2, a mistake in the code ends in a traceback. If the
    script ends early, its message ends with last_sentence(arguments), which says what is kept or
    what to type."""
    arguments = sys.argv[1:] if arguments is None else arguments
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def with_last_sentence(message):
        return f"{message}. {last_sentence(arguments)}" if last_sentence else str(message)

    open_standard_streams()
    show_what_can_be_shown()
    args = None
    try:
        join_processes()
        args = parse_args(arguments)
        main(args)
        gather()  # no process leaves before all are done
    except UserError as error:
        fail(name, error)
    except Stop as stop:
        end(name, with_last_sentence(stop), stop.status)
    except FloatingPointError as error:  # a number is not finite, perhaps in this process alone
        fail(name, with_last_sentence(error), 1)
    except KeyboardInterrupt:
        end(name, with_last_sentence("interrupted"), 130)
    except BrokenPipeError:  # the reader of the output has ended, as `| head` does
        sys.stdout = open(os.devnull, "w")
        end(name, with_last_sentence("what it prints is read no longer"), 1)
    except Exception as error:
        # A full disk, where the output goes into a file: no file that we have opened has failed
        if getattr(error, "errno", None) == errno.ENOSPC and error.filename is None:
            sys.stdout = open(os.devnull, "w")
            end(name, with_last_sentence(f"what it prints: {error.strerror}"), 1)
        # Some text was typed where the name of a file belongs.
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            fail(name, f"{error.filename}: {error.strerror}")
        if ran_out(error):
            how_to_go_on = last_sentence(arguments) if last_sentence else ""
            fail(name, out_of_memory(error, args, how_to_go_on), 1)
        if died(error):
            end(name, with_last_sentence("another process has ended, and this one with it"), 1)
        close_bars()
        add_innermost_line(error)
        raise
    finally:
        # A program that has called run_script gets its own handlers back.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def add_innermost_line(error):
    """Make the traceback of an error end with the innermost line that is not a library's, unless it
    ends there anyway. It does not if a library has raised the error, or if one of our lines has
    raised it anew."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = traceback.extract_tb(first.__traceback__)
    own = [frame for frame in frames if not is_library(frame.filename)]
    if not own:
        return
    ends_there_anyway = own[-1] is frames[-1] and first is error
    if not ends_there_anyway:
        error.add_note("The innermost line that is not a library's:")
        error.add_note("".join(traceback.format_list(own[-1:])).rstrip())


def open_standard_streams():
    """Where the shell has closed stdout or stderr (2>&-) open the null device in its place: else a
    progress bar would fail, and the next file to be opened would be taken for that stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def show_what_can_be_shown():
    """Print a question mark for a character that the terminal or file cannot show, and raise no
    error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def fail(name, message, status=2):
    """Print one line on stderr and end all processes, in whichever of them the problem came up.
    Status 2 says that it is a user's mistake."""
    close_bars()
    line = one_line(message)
    try:
        gather(problem=(name, line, status))
    except RuntimeError as error:  # the other processes have ended already
        if not died(error):
            raise
        print(f"{name}: process {processes()[0]}: {line}", file=sys.stderr)
        sys.exit(status)


def end(name, message, status):
    """End this process; the first process prints one line on stderr."""
    close_bars()
    if is_first():
        print(f"{name}: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def one_line(message):
    """A message or an exception as one line for a terminal, whatever characters the names and
    values that it quotes hold."""
    text = ""
    for c in " ".join(str(message).split()):
        shown = c if c.isprintable() else ascii(c)[1:-1]
        text += shown
    # The end of a long message is kept, since it says what to do.
    return text if len(text) <= 600 else f"{text[:320]} ... {text[-260:]}"


def resume_command(script, arguments):
    """The command that resumes the run of a script with these arguments."""
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    launcher = "python" if processes()[1] == 1 else "torchrun ..."
    command = shlex.join([os.path.relpath(script), *kept, "--resume"])
    return f"{launcher} {command}"


# --- help ---


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with one line for each option, which ends in "(default: x)" if there is a default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_default_metavar_for_optional(self, action):
        return action.dest.split("_")[-1].upper()

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS, False) or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


class ShortHelp(argparse.Action):
    """The action of --help, which shows the options that people use, and of --help-all, which shows
    every option."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        for group in parser._action_groups:
            if group.title == "more" and option_string != "--help-all":
                for action in group._group_actions:
                    action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def script_parser(name, documentation):
    """A parser for train.py or eval.py. --help does not show the options of its group "more",
    --help-all does."""
    names = textwrap.fill(
        f"names of checkpoints: tiny, {', '.join(NAMES)}", 100, break_on_hyphens=False
    )
    parser = argparse.ArgumentParser(
        usage=f"python {name} [options]",
        description=documentation,
        epilog=names,
        formatter_class=Help,
        add_help=False,
    )
    parser.error = refuse(name)
    parser.add_argument(
        "-h", "--help", "--help-all", action=ShortHelp, help="this; --help-all: every option"
    )
    return parser


def refuse(name):
    """The method `error` of a parser. It prints argparse's "argument --rank: must be ..." as
    "--rank must be ..."."""

    def error(message):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        fail(name, message)

    return error


def command_parser(name, documentation):
    """A parser for `python -m extras.<name>`. documentation: the docstring of the command's file,
    which holds an example."""
    parser = argparse.ArgumentParser(
        prog=f"python -m extras.{name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = refuse(name)
    return parser


def add_model_arguments(parser):
    """Add the options by which a command chooses a model: --ckpt, --adapter, --quantize, --device,
    --dtype."""
    parser.add_argument(
        "--ckpt", default="tiny", help="checkpoint, as train.py takes it (default: tiny)"
    )
    parser.add_argument(
        "--adapter", help="adapter directory, as train.py writes it (default: the model alone)"
    )
    add_quantize_argument(parser)
    add_device_arguments(parser)


def add_device_arguments(group):
    """The options by which scripts and commands choose where and in what a model computes."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ... (default: auto)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base model (default: auto)",
    )


def add_quantize_argument(group):
    group.add_argument(
        "--quantize",
        choices=("int8",),
        help="hold the frozen weights of the layers as 8-bit integers: half the memory of bfloat16",
    )


# --- values of options ---


def count(text):
    """A whole number of at least 1."""
    return checked(int, text, lambda value: value >= 1, "must be a whole number of at least 1")


def fraction(text):
    """A number in (0, 1]."""
    return checked(float, text, lambda value: 0 < value <= 1, "must be in (0, 1]")


def below_one(text):
    """A number in [0, 1)."""
    return checked(float, text, lambda value: 0 <= value < 1, "must be in [0, 1)")


def positive(text):
    """A positive number."""
    return checked(float, text, lambda value: 0 < value < math.inf, "must be a positive number")


def seed(text):
    """A whole number of 32 bits."""
    return checked(
        int, text, lambda value: 0 <= value < 2**32, "must be a whole number from 0 to 2^32 - 1"
    )


def names_of(allowed, kind):
    """The type of an option whose value is a list of names out of `allowed`, separated by commas.
    kind: what the names stand for."""

    def names(text):
        for name in text.split(","):
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"has the unknown {kind} {name!r}: choose from {','.join(allowed)}"
                )
        return text

    return names


def checked(kind, text, valid, requirement):
    """The number that a text stands for. kind: int or float. Raises ArgumentTypeError, which states
    the requirement, unless valid(number)."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"{requirement}, not {text}")
    return value
