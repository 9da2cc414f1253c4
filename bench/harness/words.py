"""A tokenizer made on the spot from the text that is trained on, for machines without tiktoken.

The ids: the 256 bytes, then the most frequent words, then end-of-text. A word is a run of letters
and digits or a run of signs, either with one space before it, or a run of white space; one that has
no id is spelled in bytes. The ids are spread as a real tokenizer's are (Zipf's law), which the
speed of an embedding's gradient depends on; the loss is that of this vocabulary and comparable to
no other.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fastlm.tokenizer import END_OF_TEXT, Tokenizer

WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
BYTES = 256


def word_tokenizer(texts: Iterable[str], vocab_size: int, name: str) -> Tokenizer:
    """The tokenizer of these texts with at most vocab_size ids; end-of-text is vocab_size - 1."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORDS.findall(text))
    words = [word for word, _ in counts.most_common(vocab_size - BYTES - 1)]
    ids = {word: BYTES + number for number, word in enumerate(words)}
    end = vocab_size - 1
    spelled = [bytes([byte]) for byte in range(BYTES)] + [word.encode() for word in words]

    def encode(text: str, specials: bool) -> np.ndarray:
        found: list[int] = []
        for word in WORDS.findall(text):
            number = ids.get(word)
            if number is None:
                found.extend(word.encode("utf-8", "replace"))
            else:
                found.append(number)
        return np.asarray(found, dtype=np.uint32)

    def decode(numbers: Sequence[int] | np.ndarray) -> str:
        known = (int(n) for n in numbers if n < len(spelled))
        return b"".join(spelled[n] for n in known).decode("utf-8", "replace")

    digest = hashlib.sha256("\0".join(words).encode("utf-8", "replace")).hexdigest()[:16]
    return Tokenizer(name, digest, vocab_size, end, False, (END_OF_TEXT,), encode, decode)
