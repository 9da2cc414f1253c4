"""From names to batches: text to rows of tokens, instructions and preferences to packed rows.

sources, hub, rows       where text comes from; what happens to bad rows
encode, dedup, writer    many texts to ids; duplicates; shard files
shards                   prepare: all of that, resumable, cached
tokens                   shards read back as one array
order, batches, mixture  which row comes when, from one counter; validation windows; several sources
formats, templates       instruction and preference rows as dialogues, dialogues as ids
examples, packing        the same from a name to packed rows
prefetch                 batches ready on the GPU
commands                 fastlm data prepare, fastlm data inspect
"""
