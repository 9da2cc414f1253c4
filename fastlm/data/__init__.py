"""From names to batches: text to rows of tokens, instructions and preferences to packed rows.

Data goes one way: a name is looked up in the catalogue, its source is read as text files and
records, text becomes tokens and examples become sequences, and both become batches.

catalogue      every source by its name
local, hub     files and folders; data sets of the Hugging Face hub
stdlib         python-stdlib; functions: python-functions, made of it
source         what a source is, and which split a name belongs to
records        .json, .jsonl and .parquet files, and what becomes of bad records
text/          prepare: from a name to tokens, cached
               documents, dedup, encode, shards, writer: documents to token shards, resumable
               manifest, tokens, mixture: shards read back, and what rows are drawn from
               batches: rows for training, windows for validation
examples/      load, cache: from a name to sequences of ids, kept in a file
               formats, templates, truncate: records to dialogues to ids of bounded length
               rendering, sandbox: a stranger's chat template, in a process of its own
               report: what became of every record
               packing: rows of several examples
order          which row comes when, from one counter
prefetch       batches ready on the GPU
prepare_and_inspect
               fastlm data prepare, fastlm data inspect
"""

IGNORED = -100  # a target that no loss counts
