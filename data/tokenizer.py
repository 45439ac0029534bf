"""Text to token ids and back. Four names, whatever lies behind: encode, decode, bos_id, eos_id."""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor

HERE = Path(__file__).resolve().parent


def load_tokenizer(ckpt):
    """The tokenizer in a checkpoint directory: SentencePiece's `tokenizer.model`, else `tokenizer.json`.

    It has .encode(text) -> list[int], no special token added and none recognised in the text; .decode(ids) -> str,
    special tokens left out; .bos_id, the id that starts every sequence, or None where the model has none; .eos_id;
    .vocab_size. Raises ValueError, OSError or ImportError with a line for the user."""
    directory = Path(ckpt) if Path(ckpt).is_dir() else HERE / ckpt  # `tiny` lies beside this file
    settings = {}
    for file in (directory / "tokenizer_config.json", directory / "config.json"):
        if file.is_file():
            try:
                settings |= {**json.loads(file.read_text(encoding="utf-8"))}
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{file} is not a JSON object ({error}): fix or download it") from None
    if (directory / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(directory / "tokenizer.model", settings)
    elif (directory / "tokenizer.json").is_file():
        tokenizer = JsonTokenizer(directory / "tokenizer.json", settings)
    else:
        raise FileNotFoundError(f"{directory} has no tokenizer.model and no tokenizer.json: download the model's own")
    rows = settings.get("vocab_size")
    if type(rows) is int and 0 < rows < tokenizer.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}: "
            "download the model's own"
        )
    if type(tokenizer.eos_id) is not int or not 0 <= tokenizer.eos_id < tokenizer.vocab_size:
        raise ValueError(f"{directory}: {tokenizer.eos_id!r} is no end-of-sequence token: fix tokenizer_config.json")
    return tokenizer


class SentencePieceTokenizer:
    """LLaMA 1 and 2, Mistral: a space is put before a text that does not begin with one, bytes stand in for unknown
    characters. These are the ids that transformers 5 gives; SentencePiece alone would put a second space there."""

    def __init__(self, file, settings):
        # One more protobuf field after the others overrides the model's: normalizer_spec { add_dummy_prefix: false }.
        no_prefix = b"\x1a\x02\x18\x00"
        proto = file.read_bytes()
        try:
            self.prefixing = SentencePieceProcessor(model_proto=proto)
            self.plain = SentencePieceProcessor(model_proto=proto + no_prefix)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file} is not a SentencePiece model ({str(error).strip()}): download it again") from None
        if settings.get("add_prefix_space") is False:
            self.prefixing = self.plain
        self.vocab_size = self.plain.vocab_size()
        self.bos_id = self.plain.bos_id() if settings.get("add_bos_token", True) else None
        self.eos_id = self.plain.eos_id()

    def encode(self, text):
        return (self.plain if text.startswith((" ", "▁")) else self.prefixing).encode(text)

    def decode(self, ids):
        # Of a model the vocabulary may be padded, and a row of the padding be chosen.
        return self.prefixing.decode([i for i in ids if i < self.vocab_size])


class JsonTokenizer:
    """Whatever a tokenizer.json describes (LLaMA 3, Qwen, SmolLM, ...), through the optional package `tokenizers`."""

    def __init__(self, file, settings):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(f"{file} needs the package tokenizers: pip install tokenizers") from None
        try:
            self.model = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{file} is no tokenizer that the package tokenizers reads ({error}): download it again"
            ) from None
        self.model.encode_special_tokens = True  # "</s>" in somebody's text is four characters
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = 1 + max(self.model.get_vocab().values(), default=-1)
        added = self.model.encode("").ids  # what the post-processor puts around a text
        self.bos_id = added[0] if added else None
        eos = settings.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        self.eos_id = self.model.token_to_id(eos) if isinstance(eos, str) else settings.get("eos_token_id")
        if isinstance(self.eos_id, list):
            self.eos_id = next(iter(self.eos_id), None)
        if self.eos_id is None:
            raise ValueError(
                f"{file.parent}: neither tokenizer_config.json nor config.json names an end-of-sequence token"
            )

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=True)
