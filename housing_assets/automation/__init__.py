"""What the platform does by itself, and the jobs for it: everything is off until it is switched on in the UI.

Begin with `sensors`; `conditions` says when assets follow their inputs, `jobs` has the schedule of retraining,
`approval` decides on versions, `days` prints the days of `make run`. Imports `assets`, `checks` and `runs`.
"""
