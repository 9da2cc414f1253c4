"""Speed and memory, measured beside peers in the same run: `pytest bench/ --benchmark`."""
