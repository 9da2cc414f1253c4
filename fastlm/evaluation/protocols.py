"""Four ways people turn a text into a perplexity.

window  windows of 1024 tokens side by side; the first token of each is not scored: no context
stride  windows of 1024 every 512; a token is scored once, in the first window that holds it (the
        Hugging Face guide)
line    the first 100 non-empty lines, each alone, at most 512 tokens, the first token not scored
        (gives GPT-2 its 40.64)
word    whole documents after end-of-text, detokenised; per word and per byte of the original text
        (lm-eval's wikitext)

Each gives segments: the scorer sees token ids and which of them to score, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastlm.errors import UserError, nearest
from fastlm.tokenizer import Tokenizer

NAMES = ("window", "stride", "line", "word")
WINDOW = 1024  # tokens
STRIDE = 512  # tokens from one window's start to the next one's
LINES = 100
LINE_TOKENS = 512


@dataclass(frozen=True)
class Segment:
    """Token ids; those from `start` on (at least 1) are scored, each given all before it."""

    ids: Sequence[int]
    start: int
    document: int

    @property
    def n_scored(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Protocol:
    """A text as one protocol sees it: segments, and the words and bytes that totals are divided by.

    how: what was done with the text, in words, such as how long the windows really are.
    """

    name: str
    segments: list[Segment]
    words: int
    text_bytes: int
    how: str


def chosen(names: str) -> list[str]:
    """The protocols of a comma-separated list, which may be empty."""
    wanted = names.split(",") if names else []
    for name in wanted:
        if name not in NAMES:
            raise UserError(f"unknown protocol {name!r}; {nearest(name, NAMES)}")
    return wanted


def make(name: str, documents: Sequence[str], tokenizer: Tokenizer, max_len: int) -> Protocol:
    """The protocol's view of the documents for a model that sees at most max_len tokens.

    Raises UserError where the text has too few tokens to score one, or to fill a window.
    """
    text = "".join(documents)
    if name == "word":
        segments = word_segments(documents, tokenizer, max_len)
        how = "end-of-text before each document"
    elif name == "line":
        segments, how = line_segments(text, tokenizer, max_len)
    else:
        ids = tokenizer.encode(text)
        window = min(WINDOW, max_len)
        if len(ids) < window:
            raise UserError(
                f"protocol {name}: the text has {len(ids)} tokens, too few for a window of "
                f"{window}; give a longer text, or score it with --protocols line,word"
            )
        stride = min(STRIDE, window) if name == "stride" else window
        segments = window_segments(ids, window, stride)
        how = f"windows of {window} tokens, one every {stride}"
    if not segments:
        raise UserError(
            f"protocol {name}: the text has no line or document of two tokens, too few to score "
            f"one; give a longer text"
        )
    if name == "word":  # as lm-eval counts: all of the original text
        words = sum(len(re.split(r"\s+", d)) for d in documents)
        size = len(text.encode())
    else:  # of the text that was scored, and no more
        scored = [tokenizer.decode(s.ids[s.start :]) for s in segments]
        words = max(1, sum(len(part.split()) for part in scored))
        size = sum(len(part.encode()) for part in scored)
    return Protocol(name, segments, words, size, how)


def line_segments(text: str, tokenizer: Tokenizer, max_len: int) -> tuple[list[Segment], str]:
    """The first non-empty lines, each alone and cut where it is too long; and that in words."""
    lines = [line for line in text.splitlines() if line.strip()][:LINES]
    longest = min(LINE_TOKENS, max_len)
    encoded = [tokenizer.encode(line) for line in lines]
    n_cut = sum(len(ids) > longest for ids in encoded)
    segments = [Segment(ids[:longest], 1, n) for n, ids in enumerate(encoded) if len(ids) > 1]
    return segments, f"{len(lines)} lines, {n_cut} of them cut to {longest} tokens"


def window_segments(ids: list[int], window: int, stride: int) -> list[Segment]:
    """Windows of so many tokens, one every stride (1 to window); each token is scored once."""
    segments = []
    done = 0
    for n, begin in enumerate(range(0, len(ids), stride)):
        part = ids[begin : begin + window]
        start = max(1, done - begin)
        if len(part) > start:
            segments.append(Segment(part, start, n))
        done = begin + len(part)
        if done == len(ids):
            break
    return segments


def word_segments(documents: Sequence[str], tokenizer: Tokenizer, max_len: int) -> list[Segment]:
    """Whole documents after end-of-text, in lm-eval's rolling windows."""
    segments = []
    for n, document in enumerate(documents):
        ids = tokenizer.encode(detokenise(document))
        segments += rolling(ids, tokenizer.eos_id, max_len, n)
    return segments


def rolling(ids: list[int], first: int, max_len: int, document: int) -> list[Segment]:
    """lm-eval's rolling windows of a document.

    The id `first`, then max_len new tokens a window; the last window reaches back.
    """
    segments = []
    for begin in range(0, len(ids), max_len):
        end = min(begin + max_len, len(ids))
        seen = [first, *ids[:end]] if begin == 0 else ids[end - max_len - 1 : end]
        segments.append(Segment(seen, len(seen) - (end - begin), document))
    return segments


# WikiText is spaced and escaped. These undo it in the order of lm-eval's wikitext task, so that
# results compare.
PUNCTUATION = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
HEADINGS_AND_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" " + chr(176) + " ", chr(176)),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenise(text: str) -> str:
    """WikiText's spacing undone: "s '" -> "s'", " @-@ " -> "-", "( a )" -> "(a)", "= =" -> "=="."""
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text.replace("s '", "s'"))
    for old, new in PUNCTUATION:
        text = text.replace(old, new)
    for pattern, replacement in BRACKETS:
        text = re.sub(pattern, replacement, text)
    for old, new in HEADINGS_AND_REST:
        text = text.replace(old, new)
    return text


def wikitext_documents(text: str) -> list[str]:
    """The articles of a WikiText file: one starts at each level-1 heading, " = Title = "."""
    starts = [m.start() for m in re.finditer(r"^ = [^=\n][^\n]*? = *\n", text, flags=re.M)]
    bounds = sorted({0, *starts, len(text)})
    return [text[a:b] for a, b in pairwise(bounds) if text[a:b].strip()]
