"""What a table is: columns, types, ranges, roles, the ids of its records, and figures that describe its columns.

Begin with `spec` (`TableSpec`, what a step knows of its table) and `validation` (from the pandera schema, and to it).
Ids and digests: `event_hash`, `record_ids`, `row_set_digest`. Statistics that merge: `moments`, `distributions`.
Imports `runner` only.
"""
