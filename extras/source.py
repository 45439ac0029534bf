"""Fingerprints of functions and files: they change with the code, and not with its comments or its
layout.
They tell whether a kernel may stand for a method, and which code has made a result.
Without it: delete the old results by hand after every edit, and hope that no kernel hides the edit.
"""

import hashlib
import inspect
import io
import re
import sysconfig
import textwrap
import tokenize
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

HERE = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def fingerprint(function):
    """Twelve characters that stand for a function's code. Comments, docstrings, layout and the
    messages of `raise` statements do not change them; a decorator does.

    Raises TypeError for anything but a plain function, and OSError or an error of Python's
    tokenizer if the source cannot be read."""
    if type(function) is not FunctionType:
        raise TypeError(f"{function} is no plain function")
    parts = []
    while function is not None:
        code = function.__code__
        wrapped = vars(function).get("__wrapped__")
        # The function may be what a decorator has made, such as torch.no_grad.
        is_librarys_decorator = wrapped is not None and is_library(code.co_filename)
        parts.append(code.co_qualname if is_librarys_decorator else words_of_code(code))
        function = wrapped
    return short_hash(" of ".join(parts))


def edited(fingerprints):
    """Why no other code may stand for the functions in {(class or module, name): fingerprint}:
    "RMSNorm.forward has been edited", or that its source cannot be read. None if every function
    has its fingerprint."""
    for (owner, name), expected in fingerprints.items():
        shown = owner.__name__ if isinstance(owner, type) else Path(owner.__file__).stem
        try:
            function = getattr(owner, name)
            function = getattr(function, "__func__", function)  # of a class method
            if fingerprint(function) != expected:
                return f"{shown}.{name} has been edited"
        except (OSError, TypeError, AttributeError, SyntaxError, tokenize.TokenError):
            return f"{shown}.{name} has no source to be compared"
    return None


def short_hash(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


@cache
def words_of_code(code):
    return words(inspect.getsource(code))


@cache
def words(source):
    """The tokens of Python code, separated by spaces, without those that do not change what the
    code does."""
    source = textwrap.dedent(source)
    lines = source.splitlines(keepends=True)
    kept = []
    line = []  # the tokens of the logical line that is being read
    f_string = None  # where the outermost open f-string begins, as (row, column)
    depth = 0  # how many f-strings are open
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        # From Python 3.12 on an f-string is many tokens. Here it is always one token, as it was in
        # earlier versions.
        if name in ("FSTRING_START", "TSTRING_START"):
            f_string = f_string or token.start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if depth == 0:
                line.append(text_between(lines, f_string, token.end))
                f_string = None
        elif depth > 0 or name in ("COMMENT", "NL", "ENDMARKER"):
            continue
        elif name in ("NEWLINE", "INDENT", "DEDENT"):
            is_docstring = len(line) == 1 and line[0][0] in "\"'"
            if not is_docstring:
                kept += [*without_message(line), name]
            line = []
        else:
            line.append(token.string)
    return " ".join(kept).removesuffix(" DEDENT").removesuffix(" NEWLINE")


def text_between(lines, start, end):
    """The source from one (row, column) to another. Rows are counted from 1, columns from 0."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return lines[first - 1][left:] + "".join(lines[first : last - 1]) + lines[last - 1][:right]


def without_message(line):
    """The tokens of a statement, and those of `raise ValueError(...)` only up to the bracket."""
    if "raise" not in line:
        return line
    start = line.index("raise")
    if "(" not in line[start:]:
        return line
    return line[: line.index("(", start)]


def file_fingerprint(path):
    """Twelve characters that stand for the code in a file, as those of `fingerprint` do."""
    return short_hash(words(Path(path).read_text(encoding="utf-8")))


def is_library(file):
    """Whether a file belongs to Python or to an installed package. The cells of a notebook do
    not."""
    # Debian and Colab call the directory dist-packages.
    is_installed = "site-packages" in file or "dist-packages" in file
    return is_installed or file.startswith((STANDARD_LIBRARY, "<frozen"))


# --- the code that a call may reach ---


def reached_code(*starts):
    """file -> fingerprint of the code in this file that a call of these functions and classes may
    reach.

    The code that a function may reach is found by the names in it: a function or class of that name
    among its globals, and a method of that name in any class that the search has found. The search
    may find too much, and misses only code that is looked up by a computed name. It takes the
    functions that modules and classes hold now, wherever these were written. Files of extras/ and
    of libraries are left out."""
    search = Search()
    for start in starts:
        search.add(start)
    while search.new_names():
        pass
    by_file = {}
    for file, name, text in search.pieces:
        by_file.setdefault(file, []).append(f"{name} {text}")
    return {file: short_hash("\n".join(sorted(pieces))) for file, pieces in sorted(by_file.items())}


class Search:
    """The search of `reached_code`, and what it has found so far."""

    def __init__(self):
        self.pieces = set()  # (file, name, text) of the functions and constants that were found
        self.seen = set()  # ids of functions, classes and modules
        self.owners = []  # the classes and modules in which names are looked up
        self.names = set()  # every name that a function found so far uses
        self.tried = set()  # (id of an owner, name) of each pair that was looked up

    def add(self, value, name="", file=""):
        """Take in a function, a class, a module or a constant. Values of other kinds are passed
        over, since they do not stand for code."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, FunctionType):
            self.add_function(value)
        elif isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, ModuleType):
            if is_own(getattr(value, "__file__", None) or ""):
                self.add_owner(value)
        elif file:
            self.add_constant(value, name, file)

    def add_function(self, function):
        while function is not None and id(function) not in self.seen:
            self.seen.add(id(function))
            code = function.__code__
            if is_own(code.co_filename):
                file = short_name(code.co_filename)
                self.pieces.add((file, function.__qualname__, text_of(code)))
                cls = function.__globals__.get(function.__qualname__.split(".")[0])
                if isinstance(cls, type):  # a method may call other methods of its class
                    self.add_owner(cls)
                names = names_in(code)
                self.names |= names
                for name in names & function.__globals__.keys():
                    self.add(function.__globals__[name], name, file)
                for cell in function.__closure__ or ():
                    self.add(cell.cell_contents)
            function = vars(function).get("__wrapped__")

    def add_class(self, cls):
        file = getattr(inspect.getmodule(cls), "__file__", None) or ""
        if id(cls) in self.seen or not is_own(file):
            return
        self.add_owner(cls)
        for base in cls.__bases__:
            self.add(base)
        for name, value in vars(cls).items():
            is_special = name.startswith("__") and name.endswith("__")
            # Python and PyTorch call these methods, though no code of ours has their names in it.
            is_called_by_others = is_special or name == "forward"
            if isinstance(value, FunctionType) and is_called_by_others:
                self.add(value)
            elif not name.startswith("__"):  # a value, such as the default of a config's field
                self.add_constant(value, f"{cls.__name__}.{name}", short_name(file))

    def add_constant(self, value, name, file):
        text = constant_text(value)
        if text is not None:
            self.pieces.add((file, name, text))

    def add_owner(self, owner):
        if id(owner) not in self.seen:
            self.seen.add(id(owner))
            self.owners.append(owner)

    def new_names(self):
        """Look up every name in every class and module found so far. Return whether there was a
        pair that had not been looked up before."""
        new = []
        for owner in self.owners:
            for name in self.names & vars(owner).keys():
                if (id(owner), name) not in self.tried:
                    new.append((owner, name))
        for owner, name in new:
            self.tried.add((id(owner), name))
            self.add(vars(owner)[name], name, short_name(getattr(owner, "__file__", None) or ""))
        return bool(new)


def is_own(file):
    """Whether a file is one of the project's outside extras/, or a notebook of somebody who changes
    the project."""
    in_extras = Path(file).is_relative_to(HERE / "extras")
    is_generated = file in ("", "<string>")  # such as the methods of a dataclass
    return not in_extras and not is_generated and not is_library(file)


def short_name(file):
    """The path of a file within the project; for a file elsewhere, its name."""
    path = Path(file)
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else path.name


def names_in(code):
    """The global names and attributes that a function and the functions inside it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


def text_of(code):
    """The words of a function, or its byte code if its source cannot be read."""
    try:
        return words_of_code(code)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        constants = []
        for constant in code.co_consts:
            is_function = isinstance(constant, CodeType)
            constants.append(text_of(constant) if is_function else repr(constant))
        return f"{code.co_code.hex()} {code.co_names} {constants}"


def constant_text(value):
    """A number, text, pattern or dtype, or a collection of these, as a text that is the same in
    every process; None for any other value."""
    if value is None or isinstance(value, (str, bytes, int, float, re.Pattern)):
        return repr(value)
    if type(value).__name__ == "dtype":
        return str(value)
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, (tuple, list, set, frozenset)):
        return None
    texts = [constant_text(each) for each in value]
    if None in texts:
        return None
    return repr(sorted(texts) if isinstance(value, (set, frozenset)) else texts)
