"""Removing what the deployment has made: all of it, what is abandoned, what is old.

Begin with `inventory` (what there is, and the one way to remove it); jobs are `teardown`, `sweeper` and `retention`
(prune, with what `unneeded` finds), each with its schedule. Imports `checks` and `runs`; of assets it knows the keys
only, from `code_location`.
"""
