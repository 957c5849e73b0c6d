"""Feature groups: the offline store with its history, the online store, and ingestion into both.

Begin with `offline_store` (what readers and writers call) and `feature_ingestion` (compare, write, read back, commit).
Imports `step_scripts.parameters`, `table` and `runner`; step `ingest_features` uses it.
"""
