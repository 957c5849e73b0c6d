"""Feature groups: the offline store with its history, the online store, and ingestion into both.

Begin with `offline_store` (what readers, writers and upkeep call) and `ingestion` (compare, write, read back, commit).

- A group: `group`, in one of the `group_places`; `commits` says what it holds, `iceberg_table` what is asked of
  pyiceberg.
- Events: `events` has their columns, reads and writes them, `comparison` finds out which are news.
- The online store: `online_store`, its calls and values in `online_client`.
- `__main__` replays moved groups and imports earlier layouts.

Imports `step_scripts.parameters`, `table` and `runner`; step `ingest_features` uses it.
"""
