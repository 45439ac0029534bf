"""Owns what a command of extras/ says: its help, and one line for a user's mistake.
It makes possible that every command ends alike: exit status 2 for a mistake, 130 for Ctrl-C, nothing half-written.
Without it argparse prints its usage for a mistake, and everything else is a traceback.
"""

import argparse
import os
import sys


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends "(default: x)" to the help of an option, but no "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def command_parser(name, documentation):
    """An argparse parser for `python -m extras.<name>`. documentation: the command's own docstring, an example in it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m extras.{name}", description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(name, message)
    return parser


def add_model_arguments(parser):
    """The options by which a command chooses a model: --ckpt, --adapter, --device, --dtype."""
    parser.add_argument("--ckpt", default="tiny", help="checkpoint, as train.py takes it (default: tiny)")
    parser.add_argument("--adapter", help="adapter directory, as train.py writes it (default: the model alone)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model (default: auto)")


def fail(name, message):
    """A user's mistake: one line on stderr, exit status 2."""
    print(f"{name}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def run_command(name, main, args):
    """main(args), in which ValueError, OSError and ImportError are a user's mistakes."""
    try:
        main(args)
    except (ValueError, OSError, ImportError) as error:
        fail(name, error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(message):
    """A message, an exception say, as one line for a terminal, whatever the names and values that it quotes hold."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-180:]}"  # the end says what to do


def write_whole(path, text):
    """Replace a file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
