"""What code says: fingerprints of functions and files that change with the code, and not with
comments or layout.
By them kernels know whether they may stand for a method, and results know which code has made them.
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
    """Twelve characters that change with what a function says: not with its comments, its
    docstring, its layout, or the messages of its `raise` statements. A decorator changes it. Raises
    TypeError for what is no plain function, and OSError or a tokenizer's error where the source
    cannot be had."""
    if type(function) is not FunctionType:
        raise TypeError(f"{function} is no plain function")
    parts = []
    while function is not None:
        code, wrapped = function.__code__, vars(function).get("__wrapped__")
        # Such as torch.no_grad's
        is_librarys_decorator = wrapped is not None and is_library(code.co_filename)
        parts.append(code.co_qualname if is_librarys_decorator else words_of_code(code))
        function = wrapped
    return short_hash(" of ".join(parts))


def edited(fingerprints):
    """Why none of the functions in {(class or module, name): fingerprint} may be stood for: a line,
    or None where all are as they were."""
    for (owner, name), expected in fingerprints.items():
        shown = owner.__name__ if isinstance(owner, type) else Path(owner.__file__).stem
        try:
            function = getattr(owner, name)
            if fingerprint(getattr(function, "__func__", function)) != expected:  # a class method's
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
    """The tokens of some Python code, separated by spaces."""
    source = textwrap.dedent(source)
    lines = source.splitlines(keepends=True)
    kept, line = [], []
    f_string, depth = None, 0  # where an f-string begins, and how many are open
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        # From Python 3.12 on an f-string is many tokens. Its text is taken whole, as one token, as
        # before.
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
    """The source from one (row, column) to another, as the tokenizer counts them."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return lines[first - 1][left:] + "".join(lines[first : last - 1]) + lines[last - 1][:right]


def without_message(line):
    """The tokens of a statement; of `raise ValueError(...)` those before the bracket."""
    if "raise" in line and "(" in line[line.index("raise") :]:
        return line[: line.index("(", line.index("raise"))]
    return line


def file_fingerprint(path):
    """`fingerprint` for a whole file."""
    return short_hash(words(Path(path).read_text(encoding="utf-8")))


def is_library(file):
    """Whether a file belongs to Python or to an installed package. A notebook's cells do not."""
    is_installed = "site-packages" in file or "dist-packages" in file  # the second on Debian, Colab
    return is_installed or file.startswith((STANDARD_LIBRARY, "<frozen"))


# --- the code that a call may come to ---


def reached_code(*starts):
    """file -> fingerprint of the code there that a call of these functions and classes may come to.

    What a function may come to is found by the names in it: a function or class of that name among
    its globals, and a method of that name in any class that was found before. So it may find too
    much, and misses only what is looked up by a name that is computed. The functions are those that
    modules and classes hold now, wherever they were written. Files of extras/ and of libraries are
    left out."""
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
    """What was found so far: pieces are (file, name, text) of functions and constants."""

    def __init__(self):
        self.pieces = set()
        self.seen = set()  # ids of functions, classes and modules
        self.owners = []  # the classes and modules in which names are looked up
        self.names = set()  # every name that a function found so far has in it
        self.tried = set()  # (id of an owner, name)

    def add(self, value, name="", file=""):
        """Take in a function, a class, a module or a constant; other values say nothing of the
        code."""
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
        elif (text := constant_text(value)) is not None and file:
            self.pieces.add((file, name, text))

    def add_function(self, function):
        while function is not None and id(function) not in self.seen:
            self.seen.add(id(function))
            code = function.__code__
            if is_own(code.co_filename):
                file = short_name(code.co_filename)
                self.pieces.add((file, function.__qualname__, text_of(code)))
                cls = function.__globals__.get(function.__qualname__.split(".")[0])
                if isinstance(cls, type):  # a method may call others of its class
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
        # What Python itself calls, and values such as a config's defaults
        for name, value in vars(cls).items():
            is_called_by_python = name == "forward" or (
                name.startswith("__") and name.endswith("__")
            )
            if isinstance(value, FunctionType) and is_called_by_python:
                self.add(value)
            elif not name.startswith("__"):
                self.add_constant(value, f"{cls.__name__}.{name}", file)

    def add_constant(self, value, name, file):
        if (text := constant_text(value)) is not None:
            self.pieces.add((short_name(file), name, text))

    def add_owner(self, owner):
        if id(owner) not in self.seen:
            self.seen.add(id(owner))
            self.owners.append(owner)

    def new_names(self):
        """Look every name up in every class and module found so far; whether there was one to look
        up."""
        pairs = [(owner, name) for owner in self.owners for name in self.names & vars(owner).keys()]
        new = [(owner, name) for owner, name in pairs if (id(owner), name) not in self.tried]
        for owner, name in new:
            self.tried.add((id(owner), name))
            self.add(vars(owner)[name], name, short_name(getattr(owner, "__file__", None) or ""))
        return bool(new)


def is_own(file):
    """Whether a file is the project's, outside extras/, or a notebook of who changes the
    project."""
    in_extras = file.startswith(str(HERE / "extras"))
    is_generated = file in ("", "<string>")  # as the methods of a dataclass are
    return not in_extras and not is_generated and not is_library(file)


def short_name(file):
    """A file's path within the project, or its name."""
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
    """The words of a function; where its source cannot be had, its byte code."""
    try:
        return words_of_code(code)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        constants = [text_of(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        return f"{code.co_code.hex()} {code.co_names} {constants}"


def constant_text(value):
    """A number, a text, a pattern, a dtype, or a collection of them as text, the same in every
    process; else None."""
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
