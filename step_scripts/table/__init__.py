"""What a table is: columns, types, constraints, roles, the ids of its records, and statistics of its columns.

Begin with `spec` (`TableSpec`, what a step knows of its table) and `constraints` (from the pandera model, and applied).
Ids and digests: `hashes`, `record_ids`. Statistics that merge: `moments`, `distributions`.
Imports `runner` only.
"""
