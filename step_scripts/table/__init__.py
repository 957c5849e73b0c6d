"""What a table is: columns, types, constraints, roles, the ids of its records, and statistics of its columns.

Begin with `spec` (`TableSpec`, what a step knows of its table) and `column_types` (constraints, from the pandera model
and applied; the columns in Polars).
Ids, digests, and files divided by hash: `hashes`. Statistics that merge: `distributions`.
Imports `runner` only.
"""
