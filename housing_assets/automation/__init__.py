"""What the platform does by itself, and the jobs for it: everything is off until it is switched on in the UI.

Begin with `sensors`; `jobs` has the jobs that materialize and decide, the schedule of retraining, and when assets
follow their inputs; `days` prints the days of `make run`. Imports `assets`, `reporting`, `checks` and `runs`.
"""
