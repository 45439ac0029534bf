"""The tokenizers of checkpoints: text to token ids and back, through encode, decode, bos_id and
eos_id.

The files of a checkpoint say which tokens it has, and which of them begin and end a text. They are
read as transformers 5 reads them. Text that a user writes never becomes a special token."""

import json
import re
import sys
import unicodedata
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from sentencepiece import SentencePieceProcessor

from data.errors import UserError, read_text, user_file

HERE = Path(__file__).resolve().parent
LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")  # classes of transformers that put spaces alike
# How a token is found in a text: the flags in a checkpoint's files, and their defaults.
FLAGS = {
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": True,
    "special": False,
}


def load_tokenizer(ckpt):
    """The tokenizer in a checkpoint directory. It is read from `tokenizer.json`, or else from
    SentencePiece's `tokenizer.model`, also if the package that reads tokenizer.json is absent.

    The tokenizer has
        .encode(text) -> list[int], which adds no special token and recognises none in the text
        .decode(ids) -> str, which leaves out special tokens
        .bos_id, the id that begins every sequence, or None if the model has no such id
        .eos_id, the id that ends every response
        .vocab_size
        .begin_is_stated, whether the checkpoint says if bos_id begins a sequence
    Raises UserError."""
    directory = Path(ckpt) if Path(ckpt).is_dir() else HERE / ckpt  # `tiny` lies beside this file
    settings = read_settings(directory)
    model = directory / "tokenizer.model"
    serialized = directory / "tokenizer.json"
    if not model.is_file() and not serialized.is_file():
        raise UserError(
            f"{directory} has no tokenizer.model and no tokenizer.json: download the model's own"
        )
    try:
        if serialized.is_file():
            tokenizer = JsonTokenizer(serialized, settings)
        else:
            tokenizer = SentencePieceTokenizer(model, settings)
            if tokenizer.is_unigram and settings.tokenizer_class in LLAMA:
                other = f"the {settings.tokenizer_class} of transformers takes it for a BPE"
                print(f"{model} is a unigram model: {other}, with other ids", file=sys.stderr)
    except ModuleNotFoundError:
        needed = f"{serialized} needs the package tokenizers: pip install tokenizers"
        try:
            tokenizer = SentencePieceTokenizer(model, settings)
        except UserError:  # the file is absent, or it is LLaMA 3's, which is in tiktoken's format
            raise UserError(needed) from None
        if may_differ(serialized, settings, tokenizer):
            print(f"{needed}; {model} is read instead, which may give other ids", file=sys.stderr)

    # A tokenizer.json always says it, in its post-processor.
    tokenizer.begin_is_stated = serialized.is_file() or settings.add_bos is not None
    rows = settings.rows or tokenizer.vocab_size
    # Special tokens such as <pad> may lie beyond the model's rows, since no text produces them.
    if tokenizer.text_size > rows:
        problem = f"the tokenizer has {tokenizer.text_size} tokens, the model only {rows}"
        raise UserError(f"{directory}: {problem}: download the model's own")
    if tokenizer.bos_id is not None and tokenizer.bos_id >= max(rows, tokenizer.vocab_size):
        tokenizer.bos_id = None  # the files name a token that the tokenizer does not have
    ends = [("begin", tokenizer.bos_id, settings.bos), ("end", tokenizer.eos_id, settings.eos)]
    for side, i, name in ends:
        if i is not None and not 0 <= i < rows:
            problem = (
                f"{i} is no {side}-of-sequence token: it is named {name!r}, the model has "
                f"{rows} tokens"
            )
            raise UserError(f"{directory}: {problem}: fix tokenizer_config.json")
    return tokenizer


def read_json(file):
    """The object in a JSON file, or an empty one if the file is absent."""
    if not file.is_file():
        return {}
    try:
        return {**json.loads(read_text(file))}
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON object ({error}): fix or download it") from None


def read_settings(directory):
    """What the files of a checkpoint say about its tokenizer:

    added: token -> its flags, in the order of the tokens' ids
    special: the tokens that no text produces
    older: whether the tokens are listed in the files of earlier versions of transformers
    bos, eos: the tokens that begin and end a sequence, or None
    eos_id: the id of eos in the model's config, or -1
    rows: the size of the model's vocabulary, or None
    add_bos: whether the beginning-of-sequence token is put before a text; None where it is not said
    add_prefix_space, legacy, tokenizer_class: how a text is encoded"""
    config = read_json(directory / "config.json")
    stated = read_json(directory / "tokenizer_config.json")
    older = "added_tokens_decoder" not in stated
    try:
        if older:
            stated |= read_json(directory / "special_tokens_map.json")
        added = added_tokens(directory, stated, older)
        extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or ()
        if isinstance(extra, dict):
            extra = extra.values()
        extra = [content(token) for token in extra]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: its list of added tokens is broken ({error}): download it again"
        ) from None

    named = {}
    for name in ("bos_token", "eos_token", *stated):
        if name.endswith("_token"):
            named[name] = content(stated.get(name))
    special = [*named.values(), *extra, *(token for token in added if added[token]["special"])]

    tokenizer_class = stated.get("tokenizer_class") or config.get("tokenizer_class") or ""
    tokenizer_class = str(tokenizer_class).removesuffix("Fast")
    if config.get("model_type") == "mistral":
        # For Mistral transformers uses a class that belongs to no model, whatever the files say.
        tokenizer_class = "of no model"
    rows = config.get("vocab_size")
    eos_id = config.get("eos_token_id")
    if isinstance(eos_id, list):
        eos_id = next(iter(eos_id), None)
    return SimpleNamespace(
        added=added,
        special=[token for token in dict.fromkeys(special) if token],
        older=older,
        bos=named["bos_token"],
        eos=named["eos_token"],
        eos_id=eos_id if type(eos_id) is int else -1,
        rows=rows if type(rows) is int and rows > 0 else None,
        add_bos=stated.get("add_bos_token"),
        add_prefix_space=stated.get("add_prefix_space"),
        legacy=bool(stated.get("legacy", tokenizer_class not in LLAMA)),
        tokenizer_class=tokenizer_class,
    )


def added_tokens(directory, stated, older):
    """token -> its flags, in the order of the tokens' ids, for the tokens that a checkpoint's files
    add to the tokenizer's own. stated: the object in tokenizer_config.json."""
    listed = {}  # id -> token
    if older:
        for token, i in read_json(directory / "added_tokens.json").items():
            listed[int(i)] = {"content": token}
    else:
        for i, token in stated["added_tokens_decoder"].items():
            listed[int(i)] = dict(token)
    added = {}
    for i in sorted(listed):
        token = listed[i]
        added[token["content"]] = {flag: bool(token.get(flag, FLAGS[flag])) for flag in FLAGS}
    return added


def content(token):
    """A token as text. In a JSON file a token is a string or an object; anything else is None."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class SentencePieceTokenizer:
    """The tokenizer of LLaMA 1 and 2 and of Mistral: it puts a space before a text, and bytes stand
    for unknown characters.

    The ids are those of transformers 5. Its LlamaTokenizer normalises nothing, whatever the model's
    own settings are, and puts no space before a text that begins with a space. Its other classes
    heed these settings, and put a second space there, as SentencePiece does. After an added token
    they put a space if the config says `legacy`."""

    def __init__(self, file, settings):
        with user_file(file):
            proto = file.read_bytes()
        # In the file a piece is its length, its text, its score and its type. SentencePiece finds a
        # piece of type 4, user-defined, in every text, and one of type 3, control, in no text.
        for token in settings.special:
            before = rb"(?<=\n." + re.escape(token.encode()) + rb"\x15.{4}\x18)"
            proto = re.sub(before + rb"\x04", b"\x03", proto, flags=re.DOTALL)
        llama = settings.tokenizer_class in LLAMA
        prefixed, plain = b"", normalizer_spec(add_dummy_prefix=False)
        if llama:
            exact = {"precompiled_charsmap": b"", "remove_extra_whitespaces": False}
            prefix = settings.add_prefix_space is not False
            prefixed = normalizer_spec(**exact, add_dummy_prefix=prefix)
            plain = normalizer_spec(**exact, add_dummy_prefix=False)
        try:
            self.prefixing = SentencePieceProcessor(model_proto=proto + prefixed)
            self.plain = model = SentencePieceProcessor(model_proto=proto + plain)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{file} is not a SentencePiece model ({str(error).strip()}): download it again"
            ) from None
        self.puts_space = self.prefixing.encode("a") != self.plain.encode("a")
        # Whether a space is put before the text after an added token, and before a text that begins
        # with a space
        self.prefix_parts = settings.legacy
        self.prefix_spaces = settings.legacy and not llama

        size = model.vocab_size()
        self.ids = {}
        for token in dict.fromkeys([*settings.added, *settings.special]):
            i = model.piece_to_id(token)
            if model.id_to_piece(i) != token:  # the model lacks the token, which gets the next id
                i = max([size - 1, *self.ids.values()]) + 1
            self.ids[token] = i
        # The scores of a BPE are whole numbers, those of a unigram model are log-probabilities.
        self.is_unigram = any(model.get_score(i) % 1 for i in range(size))
        self.vocab_size = max([size, *(self.ids[token] + 1 for token in settings.added)])

        # SentencePiece returns -1 for an id that the model does not have.
        bos_id = model.bos_id() if model.bos_id() >= 0 else None
        eos_id = model.eos_id() if model.eos_id() >= 0 else settings.eos_id
        self.bos_id = self.ids.get(settings.bos, bos_id) if settings.add_bos is not False else None
        self.eos_id = self.ids.get(settings.eos, eos_id)
        self.special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
        self.special.add(self.eos_id)
        self.special |= {self.ids[token] for token in settings.special}
        self.added = {i: token for token, i in self.ids.items() if i not in self.special}
        self.text_size = 1 + max({*range(size), *self.added} - self.special, default=-1)
        if llama:  # which finds the model's user-defined pieces as it finds added tokens
            for token in user_defined(proto):
                if (i := model.piece_to_id(token)) not in self.special:
                    self.ids[token] = i
                    self.added[i] = token
        self.single_words = set()
        patterns = []
        # The longest token comes first, since Python takes the first pattern that fits.
        for token in sorted(self.added.values(), key=len, reverse=True):
            flags = settings.added.get(token, FLAGS)
            left = r"\s*" if flags["lstrip"] else ""
            right = r"\s*" if flags["rstrip"] else ""
            patterns.append(f"{left}({re.escape(token)}){right}")
            if flags["single_word"]:
                self.single_words.add(token)
        self.pattern = re.compile("|".join(patterns) or "(?!)")

    def encode(self, text):
        ids, end = [], 0
        for match in self.pattern.finditer(text):
            token, (left, right) = match[match.lastindex], match.span(match.lastindex)
            is_in = is_in_word(text[:left][-1:]) or is_in_word(text[right : right + 1])
            if is_in and token in self.single_words:
                continue
            ids += self.encode_part(text[end : match.start()], end)
            ids.append(self.ids[token])
            end = match.end()
        return ids + self.encode_part(text[end:], end)

    def encode_part(self, part, start):
        """The ids of a part of a text, which begins at position `start` and holds no added
        token."""
        gets_prefix = start == 0 or self.prefix_parts
        if part.startswith((" ", "▁")) and not self.prefix_spaces:
            gets_prefix = False
        model = self.prefixing if gets_prefix else self.plain
        return model.encode(part)

    def decode(self, ids):
        # A model's vocabulary may be padded beyond the tokenizer's, and the model may choose an id
        # of the padding.
        ids = [i for i in ids if i < self.vocab_size and i not in self.special]
        text = ""
        for are_added, part in groupby(ids, self.added.__contains__):
            if are_added:
                text += "".join(self.added[i].replace("▁", " ") for i in part)
            else:
                # self.prefixing removes the space that it put before the text.
                model = self.plain if text else self.prefixing
                text += model.decode(list(part))
        return text


def is_in_word(character):
    """Whether a character is part of a word, as the package tokenizers has it: marks are, too."""
    if not character:
        return False
    category = unicodedata.category(character)
    joins = category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
    return category[0] in "LM" or joins


def user_defined(proto):
    """The user-defined pieces of a SentencePiece model: in the file a piece is its length, its
    text, its score and its type, 4."""
    piece = rb"(?=\n([\x01-\x7f])([^\x15]{1,127}?)\x15.{4}\x18\x04)"
    found = re.findall(piece, proto, re.DOTALL)
    return [text.decode(errors="replace") for length, text in found if length[0] == len(text)]


def normalizer_spec(**fields):
    """The field normalizer_spec of a SentencePiece model, in the encoding of protobuf. Behind a
    file's content it overrides the fields in the file."""
    tags = {
        "precompiled_charsmap": 0x12,
        "add_dummy_prefix": 0x18,
        "remove_extra_whitespaces": 0x20,
    }
    spec = b""
    for name, value in fields.items():
        length_or_value = len(value) if isinstance(value, bytes) else value
        spec += bytes([tags[name], length_or_value])
    return bytes([0x1A, len(spec)]) + spec


def may_differ(file, settings, tokenizer):
    """Whether a tokenizer.json has other added tokens than a SentencePieceTokenizer, or begins a
    text otherwise: with another token, or with a space or without one."""
    raw = read_json(file)
    try:
        tokens = {token["content"]: token["id"] for token in raw.get("added_tokens", ())}
        post_processor = raw.get("post_processor") or {}
        template = post_processor.get("single") or [{}]
        first = template[0].get("SpecialToken", {}).get("id")
        steps = []  # of the normalizer and the pre-tokenizer
        for step in (raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}):
            steps += step.get("normalizers") or step.get("pretokenizers") or [step]
        spaces = next(filter(any, map(spaces_of, steps)), (False, False, False))
    except (AttributeError, KeyError, TypeError, IndexError):
        return True
    ids = {token: tokenizer.plain.piece_to_id(token) for token in tokens} | tokenizer.ids
    if any(ids[token] != i for token, i in tokens.items()) or ids.get(first) != tokenizer.bos_id:
        return True
    if settings.tokenizer_class in LLAMA or not any(steps):
        return False  # JsonTokenizer.follow_llama puts spaces, whatever the file says
    found = tokenizer.puts_space, tokenizer.prefix_parts, tokenizer.prefix_spaces
    return spaces != (found if found[0] else (False, False, False))


def spaces_of(step):
    """Whether a step of a tokenizer.json puts a space before a text, before the text after an added
    token too, and before a text that begins with a space too."""
    if step.get("type") == "Metaspace":
        scheme = "always" if step.get("add_prefix_space", True) else "never"
        scheme = step.get("prepend_scheme", scheme)
        return scheme != "never", scheme == "always", False
    is_prepend = step.get("type") == "Prepend"
    return is_prepend, is_prepend, is_prepend


class JsonTokenizer:
    """The tokenizer that a tokenizer.json describes (LLaMA 3, Qwen, SmolLM, ...). The optional
    package `tokenizers` runs it."""

    def __init__(self, file, settings):
        from tokenizers import AddedToken, Tokenizer
        from tokenizers import __version__ as version

        try:
            self.model = model = Tokenizer.from_str(read_text(file))
        except UserError:
            raise
        except Exception as error:  # the package raises nothing narrower
            read_json(file)  # whether it is whole
            problem = f"is no tokenizer that the package tokenizers {version} reads ({error})"
            raise UserError(
                f"{file} {problem}: a newer one may read it, pip install -U tokenizers"
            ) from None
        is_byte_level = "ByteLevel" in f"{model.pre_tokenizer}{model.decoder}"
        if settings.tokenizer_class in LLAMA and not is_byte_level:
            self.follow_llama(settings)
        model.encode_special_tokens = True  # "</s>" in somebody's text is four characters
        model.no_truncation()
        model.no_padding()
        listed = ()  # the added tokens of tokenizer.json that keep the flags they have there
        if settings.older:
            listed = {token.content for token in model.get_added_tokens_decoder().values()}
        added = settings.added.items()
        model.add_tokens([AddedToken(t, **flags) for t, flags in added if t not in listed])
        self.vocab_size = 1 + max(model.get_vocab().values(), default=-1)
        model.add_special_tokens(settings.special)  # a token that is there already becomes special

        # An encoded text shows what the post-processor puts before a text and after it.
        probe = model.encode("a")
        text = [i for i, is_put in enumerate(probe.special_tokens_mask) if not is_put] or [0]
        before = probe.ids[: text[0]]
        after = probe.ids[text[-1] + 1 :]
        self.bos_id = before[0] if before else None
        if settings.tokenizer_class == "CodeLlamaTokenizer":  # it puts one whatever the file says
            self.bos_id = model.token_to_id(settings.bos or "<s>")
        self.eos_id = after[0] if after else settings.eos_id
        if settings.eos:
            self.eos_id = model.token_to_id(settings.eos)
        ends = [i for i in (self.bos_id, self.eos_id) if i is not None and 0 <= i < self.vocab_size]
        tokens = [model.id_to_token(i) for i in ends]
        model.add_special_tokens([token for token in tokens if token])
        special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.text_size = 1 + max(set(model.get_vocab().values()) - special, default=-1)

    def follow_llama(self, settings):
        """Put spaces where transformers' LlamaTokenizer puts them, whatever tokenizer.json says."""
        from tokenizers import decoders, pre_tokenizers

        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if settings.add_prefix_space is False:
            scheme = "never"
        else:
            scheme = "always" if settings.legacy else "first"
            parts.append(decoders.Strip(" ", 1, 0))  # removes the space before the text
        self.model.normalizer = None
        self.model.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        self.model.decoder = decoders.Sequence(parts)

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=True)
