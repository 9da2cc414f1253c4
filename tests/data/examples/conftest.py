"""GPT-2's tokenizer, which most tests of examples need."""

import pytest

from fastlm.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def gpt2():
    return load_tokenizer("gpt2")
