"""From sources to batches: text, token shards, order, packing."""
