"""Source files to validated rows, and rows to splits: kernels on one piece, and what the pieces find together.

Begin with `csv_chunks` (cuts a file), `csv_source` (ranges of files as blocks), `accepted_rows` (what becomes of a
block) and `splits`. Imports `step_scripts.parameters`, `table` and `runner`; steps `validate_source` and
`prepare_splits` use it.
"""
