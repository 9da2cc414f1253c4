"""Writing with a model: sampling, a cache of keys and values, generation, text, chat."""
