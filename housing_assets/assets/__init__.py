"""The assets, a module a group, from the source to the endpoint; and what only they need.

Begin with `ingestion`; then `splits`, `model`, `serving`. An asset calls a resource by its abstract type, and the gate
(`checks.gate`) before it uses an input. `landing` knows the files of the landing place and their days.
Imports `reporting`, `checks`, `runs` and the modules of the package itself.
"""
