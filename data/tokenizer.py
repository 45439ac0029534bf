"""Text to token ids and back. Four names, whatever lies behind: encode, decode, bos_id, eos_id.

Which tokens there are, and which begin and end a text, the checkpoint's files say, read as
transformers 5 reads them. What a user writes never becomes a special token."""

import json
import re
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from sentencepiece import SentencePieceProcessor

from data.errors import UserError, user_file

HERE = Path(__file__).resolve().parent
FLAGS = {
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": True,
    "special": False,
}


def load_tokenizer(ckpt):
    """The tokenizer in a checkpoint directory: `tokenizer.json`, else SentencePiece's
    `tokenizer.model`, which is also read where the package for the former is absent.

    It has .encode(text) -> list[int], no special token added and none recognised in the text;
    .decode(ids) -> str, special tokens left out; .bos_id, the id that starts every sequence, or
    None where the model has none; .eos_id; .vocab_size. Raises UserError."""
    directory = Path(ckpt) if Path(ckpt).is_dir() else HERE / ckpt  # `tiny` lies beside this file
    settings = read_settings(directory)
    model, serialized = directory / "tokenizer.model", directory / "tokenizer.json"
    if not model.is_file() and not serialized.is_file():
        raise UserError(
            f"{directory} has no tokenizer.model and no tokenizer.json: download the model's own"
        )
    try:
        readers = {serialized: JsonTokenizer, model: SentencePieceTokenizer}
        tokenizer = next(
            reader(file, settings) for file, reader in readers.items() if file.is_file()
        )
    except ModuleNotFoundError:
        needed = f"{serialized} needs the package tokenizers: pip install tokenizers"
        try:
            tokenizer = SentencePieceTokenizer(model, settings)
        except UserError:  # there is none, or it is LLaMA 3's, which is tiktoken's
            raise UserError(needed) from None
        if may_differ(serialized, tokenizer):
            print(f"{needed}; {model} is read instead, which may give other ids", file=sys.stderr)

    rows = settings.rows or tokenizer.vocab_size
    if tokenizer.text_size > rows:  # a <pad> beyond the rows does no harm: no text produces it
        problem = f"the tokenizer has {tokenizer.text_size} tokens, the model only {rows}"
        raise UserError(f"{directory}: {problem}: download the model's own")
    if tokenizer.bos_id is not None and tokenizer.bos_id >= max(rows, tokenizer.vocab_size):
        tokenizer.bos_id = None  # the name of a token that there is not
    for side, i, name in (
        ("begin", tokenizer.bos_id, settings.bos),
        ("end", tokenizer.eos_id, settings.eos),
    ):
        if i is not None and not 0 <= i < rows:
            problem = (
                f"{i} is no {side}-of-sequence token: it is named {name!r}, the model has "
                f"{rows} tokens"
            )
            raise UserError(f"{directory}: {problem}: fix tokenizer_config.json")
    return tokenizer


def read_json(file):
    """The object in a JSON file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    try:
        with user_file(file):
            return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON object ({error}): fix or download it") from None


def read_settings(directory):
    """What the files beside a tokenizer say of it: `added`, a token -> its flags, in the order of
    ids; `special`, the tokens that no text produces; `bos` and `eos`, those by these names, or
    None; `legacy`, `rows`, ..."""
    config, stated = (
        read_json(directory / "config.json"),
        read_json(directory / "tokenizer_config.json"),
    )
    older = "added_tokens_decoder" not in stated  # only then do two more files count
    try:
        if older:
            stated |= read_json(directory / "special_tokens_map.json")
            listed = {
                int(i): {"content": t}
                for t, i in read_json(directory / "added_tokens.json").items()
            }
        else:
            listed = {int(i): dict(token) for i, token in stated["added_tokens_decoder"].items()}
        added = {
            listed[i]["content"]: {f: bool(listed[i].get(f, FLAGS[f])) for f in FLAGS}
            for i in sorted(listed)
        }
        extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or ()
        extra = [content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: its list of added tokens is broken ({error}): download it again"
        ) from None
    named = {
        name: content(stated.get(name))
        for name in ("bos_token", "eos_token", *stated)
        if name.endswith("_token")
    }
    special = [*named.values(), *extra, *(token for token in added if added[token]["special"])]
    tokenizer_class = str(
        stated.get("tokenizer_class") or config.get("tokenizer_class") or ""
    ).removesuffix("Fast")
    if config.get("model_type") == "mistral":
        # Whatever it says, transformers takes the one that all models share
        tokenizer_class = "of no model"
    rows, eos_id = config.get("vocab_size"), config.get("eos_token_id")
    eos_id = next(iter(eos_id), None) if isinstance(eos_id, list) else eos_id
    return SimpleNamespace(
        added=added,
        special=[token for token in dict.fromkeys(special) if token],
        older=older,
        bos=named["bos_token"],
        eos=named["eos_token"],
        eos_id=eos_id if type(eos_id) is int else -1,
        rows=rows if type(rows) is int and rows > 0 else None,
        add_bos=stated.get("add_bos_token", True),
        add_prefix_space=stated.get("add_prefix_space"),
        legacy=bool(stated.get("legacy", tokenizer_class not in ("LlamaTokenizer", ""))),
        tokenizer_class=tokenizer_class,
    )


def content(token):
    """A token as text, be it a string or an object in a JSON file; None of anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class SentencePieceTokenizer:
    """LLaMA 1 and 2, Mistral: a space is put before a text, bytes stand in for unknown characters.
    The ids are those of transformers 5. Its LlamaTokenizer puts none before a text that begins with
    one; its others, as SentencePiece does, put a second there. After an added token they put one
    where the config says `legacy`."""

    def __init__(self, file, settings):
        with user_file(file):
            proto = file.read_bytes()
        # A piece of type 4, a user's own, is found in every text; of type 3 in none
        for token in settings.special:
            # Length, piece, score
            before = rb"(?<=\n." + re.escape(token.encode()) + rb"\x15.{4}\x18)"
            proto = re.sub(before + rb"\x04", b"\x03", proto, flags=re.DOTALL)
        # One more protobuf field after the others overrides the model's: normalizer_spec {
        # add_dummy_prefix: false }.
        no_prefix = b"\x1a\x02\x18\x00"
        try:
            self.prefixing = SentencePieceProcessor(model_proto=proto)
            self.plain = model = SentencePieceProcessor(model_proto=proto + no_prefix)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{file} is not a SentencePiece model ({str(error).strip()}): download it again"
            ) from None
        llama = settings.tokenizer_class in ("LlamaTokenizer", "")
        if llama and settings.add_prefix_space is False:
            self.prefixing = self.plain
        self.prefix_parts, self.prefix_spaces = settings.legacy, settings.legacy and not llama

        size, self.ids = model.vocab_size(), {}
        # What the model lacks gets the next free id
        for token in dict.fromkeys([*settings.added, *settings.special]):
            i = model.piece_to_id(token)
            self.ids[token] = (
                i if model.id_to_piece(i) == token else max([size - 1, *self.ids.values()]) + 1
            )
        self.vocab_size = max([size, *(self.ids[token] + 1 for token in settings.added)])
        bos_id, eos_id = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        self.bos_id = self.ids.get(settings.bos, bos_id) if settings.add_bos else None
        self.eos_id = self.ids.get(settings.eos, settings.eos_id if eos_id is None else eos_id)
        self.special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)} | {
            self.eos_id
        }
        self.special |= {self.ids[token] for token in settings.special}
        self.added = {i: token for token, i in self.ids.items() if i not in self.special}
        self.text_size = 1 + max({*range(size), *self.added} - self.special, default=-1)
        patterns = [  # the longest first, since Python takes the first that fits
            r"\s*" * settings.added[token]["lstrip"]
            + f"({re.escape(token)})"
            + r"\s*" * settings.added[token]["rstrip"]
            for token in sorted(self.added.values(), key=len, reverse=True)
        ]
        self.pattern = re.compile("|".join(patterns) or "(?!)")

    def encode(self, text):
        ids, end = [], 0
        for match in self.pattern.finditer(text):
            ids += [
                *self.encode_part(text[end : match.start()], end),
                self.ids[match[match.lastindex]],
            ]
            end = match.end()
        return ids + self.encode_part(text[end:], end)

    def encode_part(self, part, start):
        prefix = (start == 0 or self.prefix_parts) and (
            self.prefix_spaces or not part.startswith((" ", "▁"))
        )
        return (self.prefixing if prefix else self.plain).encode(part)

    def decode(self, ids):
        # Of a model the vocabulary may be padded, and a row of the padding be chosen.
        ids, text = [i for i in ids if i < self.vocab_size and i not in self.special], ""
        for added, run in groupby(ids, self.added.__contains__):
            if added:
                text += "".join(self.added[i].replace("▁", " ") for i in run)
            else:  # the space that was put there stands only at the beginning
                text += (self.plain if text else self.prefixing).decode(list(run))
        return text


def may_differ(file, tokenizer):
    """Whether a tokenizer.json has a token, or begins a text, as the tokenizer made of
    tokenizer.model does not."""
    raw = read_json(file)
    try:
        tokens = {token["content"]: token["id"] for token in raw.get("added_tokens", ())}
        first = (
            ((raw.get("post_processor") or {}).get("single") or [{}])[0]
            .get("SpecialToken", {})
            .get("id")
        )
    except (AttributeError, KeyError, TypeError):
        return True
    ids = {token: tokenizer.plain.piece_to_id(token) for token in tokens} | tokenizer.ids
    return any(ids[token] != i for token, i in tokens.items()) or ids.get(first) != tokenizer.bos_id


class JsonTokenizer:
    """Whatever a tokenizer.json describes (LLaMA 3, Qwen, SmolLM, ...), through the optional
    package `tokenizers`."""

    def __init__(self, file, settings):
        from tokenizers import AddedToken, Tokenizer

        try:
            self.model = model = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            problem = f"is no tokenizer that the package tokenizers reads ({error})"
            raise UserError(f"{file} {problem}: download it again") from None
        if (
            settings.tokenizer_class == "LlamaTokenizer"
            and "ByteLevel" not in f"{model.pre_tokenizer}{model.decoder}"
        ):
            self.follow_llama(settings)
        model.encode_special_tokens = True  # "</s>" in somebody's text is four characters
        model.no_truncation()
        model.no_padding()
        listed = (
            {token.content for token in model.get_added_tokens_decoder().values()}
            if settings.older
            else ()
        )
        model.add_tokens(
            [AddedToken(t, **flags) for t, flags in settings.added.items() if t not in listed]
        )
        self.vocab_size = 1 + max(model.get_vocab().values(), default=-1)
        model.add_special_tokens(settings.special)  # those that are there already become special

        probe = model.encode("a")  # what the post-processor puts around a text
        text = [i for i, is_put in enumerate(probe.special_tokens_mask) if not is_put] or [0]
        before, after = probe.ids[: text[0]], probe.ids[text[-1] + 1 :]
        self.bos_id = before[0] if before else None
        self.eos_id = after[0] if after else settings.eos_id
        if settings.eos:
            self.eos_id = model.token_to_id(settings.eos)
        ends = [i for i in (self.bos_id, self.eos_id) if i is not None and 0 <= i < self.vocab_size]
        model.add_special_tokens([token for i in ends if (token := model.id_to_token(i))])
        special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.text_size = 1 + max(set(model.get_vocab().values()) - special, default=-1)

    def follow_llama(self, settings):
        """Where spaces are put transformers' LlamaTokenizer decides, not the file."""
        from tokenizers import decoders, pre_tokenizers

        prefixes = settings.add_prefix_space is not False
        scheme = ("always" if settings.legacy else "first") if prefixes else "never"
        self.model.normalizer, self.model.pre_tokenizer = (
            None,
            pre_tokenizers.Metaspace("▁", scheme, split=False),
        )
        parts = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        self.model.decoder = decoders.Sequence(parts if prefixes else parts[:-1])

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=True)
