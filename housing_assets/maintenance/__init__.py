"""Removing what the deployment has made: all of it, what is abandoned, what is old.

Begin with `owners` (who lists and removes what); jobs are `teardown`, `sweeper` and `retention` (prune), each with its
schedule. Imports `checks` and `runs`; of assets it knows the keys only, from `code_location`.
"""
