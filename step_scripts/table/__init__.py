"""What a table is: columns, types, constraints, roles, the ids of its records, and statistics of its columns.

Begin with `spec` (`TableSpec`, what a step knows of its table) and `constraints` (from the pandera model, and applied).
Ids and digests: `hashes`. Statistics that merge: `distributions`.
Imports `runner` only.
"""
