"""Feature groups: the offline store with its history, the online store, and ingestion into both.

Begin with `offline_store` (what readers and writers call) and `feature_ingestion` (compare, write, read back, commit).
`group` is a feature group, with a table in an SQLite catalog (`local_group`) or in Glue (`glue_group`). `iceberg_table`
is all that asks pyiceberg. `upkeep` expires and compacts, `takeover` replays moved groups and imports earlier layouts.
Imports `step_scripts.parameters`, `table` and `runner`; step `ingest_features` uses it.
"""
