"""Source files to validated rows, and rows to splits: kernels on one block, and what the blocks find together.

Two words: a *fragment* is a range of bytes of a file, read on its own; a *partition* holds all rows whose keys have
certain hashes.

Begin with `source_pass` (the driver's side of reading CSV files), `csv_fragments` (the tasks' side), `csv_rows` (from
text to rows) and `splits`. Imports `step_scripts.parameters`, `table` and `runner`; steps `validate_source` and
`prepare_splits` use it.
"""
