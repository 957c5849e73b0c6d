"""The checks, a module a group, as `assets`; and what refuses to go on where one of them has failed.

Begin with `blocking` (keeps each result as evidence) and `gate` (the one helper that refuses). Advisory checks only
warn (`advisory`); `alerts` sends notifications; `watching` has the endpoint's health and drift, and their job.
Imports no other room: assets, reports and jobs all stand on checks.
"""
