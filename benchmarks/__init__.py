"""One script a question. Each prints what it measured and writes a JSON line to `benchmarks/results.jsonl`."""
