"""How runs are executed and how they end: with the right status, also where a process is lost.

Begin with `executor`; `lost_runs` has the run launcher that `dagster.yaml` names. Imports no other room.
"""
