"""fastlm.load: a model and its tokenizer, to use from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastlm.config import Sampling
from fastlm.evaluation.protocols import make
from fastlm.evaluation.score import segment_nats, summarise
from fastlm.inference.text import prompt_ids, write_texts
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.model import Transformer
from fastlm.runtime import pick_device
from fastlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer and the ids that end its texts."""

    model: Transformer
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def generate(
        self,
        prompt: str,
        tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 0.95,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """The continuation of the prompt, as `fastlm generate` writes it with the same options.

        At most so many tokens, up to the first of the `stop` texts or the model's own end of text.
        """
        ids = prompt_ids(self.tokenizer, prompt, self.model.config.vocab_size)
        sampling = Sampling(temperature=temperature, top_p=top_p)
        (text,) = write_texts(
            self.model, self.tokenizer, [ids], tokens, sampling, seed, self.stop_ids, stop
        )
        return text

    def perplexity(self, text: str) -> float:
        """exp of the mean -log p of the text's tokens, as `fastlm eval --protocols window` has it.

        The windows are of 1024 tokens side by side, or as long as the model can read; a text that
        is shorter than one raises UserError.
        """
        windows = make("window", [text], self.tokenizer, self.model.config.max_seq_len)
        nats = segment_nats(self.model, windows.segments, self.model.embedding.device)
        return summarise(windows, nats).perplexity


def load(place: str, device: str = "auto", tokenizer: str = "") -> LanguageModel:
    """The model of a run, a checkpoint or a Hugging Face folder of the Llama family.

    device: auto (cuda when there is one), cpu, cuda or cuda:N. tokenizer: gpt2 or a tokenizer.json,
    where it is not the model's own. Raises UserError where nothing can be loaded.
    """
    model, found = open_model(place, pick_device(device), tokenizer)
    return LanguageModel(model, found, frozenset(stop_tokens(place, found)))
