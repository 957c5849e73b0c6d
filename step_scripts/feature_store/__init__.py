"""Feature groups: the offline store with its history, the online store, and ingestion into both.

Begin with `offline_store` (what readers and writers call) and `ingestion` (compare, write, read back, commit).

- A group: `group` with `group_state` and `commits`; its table is in an SQLite catalog (`local_group`) or in Glue
  (`glue_group`), and `iceberg_table` says what is asked of pyiceberg.
- Events: `event_schema` has their columns, `event_sources` reads them, `comparison` finds out which are news,
  `data_files` writes them and reads them back.
- The online store: `online_store`, its calls in `online_client`, values as text in `feature_values`.
- `upkeep` expires and compacts, `takeover` replays moved groups and imports earlier layouts.

Imports `step_scripts.parameters`, `table` and `runner`; step `ingest_features` uses it.
"""
