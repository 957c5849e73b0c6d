"""The assets, in the order of the graph: ingestion, splits, model, serving."""
