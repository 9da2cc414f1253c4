"""Encoded examples kept in a file; one that is not whole or of another form is as good as none."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastlm import files
from fastlm.data.examples.report import Examples, Report
from fastlm.data.examples.templates import EncodedSequence
from fastlm.errors import UserError
from fastlm.schema import parse

ARRAYS = {"ids": "int32", "counted": "bool", "ends": "int64"}
# What zipfile, zlib, numpy's header parser and ours raise for a file that is not whole, whichever
# of its bytes is wrong.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    UserError,
)


def write_cache(file: Path, examples: Examples) -> None:
    """Keep the examples, those of training first; UserError where the disk refuses."""
    sequences = [*examples.train, *examples.validation]
    report = asdict(examples.report) | {"train_sequences": len(examples.train)}
    with files.whole_file(file) as stream:
        np.savez(
            stream,
            ids=np.concatenate([s.ids for s in sequences]),
            counted=np.concatenate([s.counted for s in sequences]),
            ends=np.cumsum([len(s.ids) for s in sequences]),
            report=np.frombuffer(json.dumps(report).encode(), np.uint8),
        )


def read_cache(file: Path) -> Examples | None:
    """The examples of a file; None where it is absent, damaged or of another form."""
    try:
        with np.load(file, allow_pickle=False) as content:
            ids, counted, ends = (_array(content, name, dtype) for name, dtype in ARRAYS.items())
            fields = json.loads(content["report"].tobytes())
        report = parse(Report, fields)
        n_train = parse(int, fields.get("train_sequences"))
    except DAMAGED:
        return None
    rising = len(ends) > 0 and (np.diff(ends, prepend=0) > 0).all()
    if not rising or not len(ids) == len(counted) == ends[-1]:
        return None
    starts = [0, *ends[:-1].tolist()]
    spans = zip(starts, ends.tolist(), strict=True)
    sequences = [EncodedSequence(ids[start:end], counted[start:end]) for start, end in spans]
    return Examples(sequences[:n_train], sequences[n_train:], report)


def _array(content: Mapping[str, np.ndarray], name: str, dtype: str) -> np.ndarray:
    array = content[name]
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(
            f"{name}: {array.dtype} of shape {array.shape}, expected {dtype} of one dimension"
        )
    return array
