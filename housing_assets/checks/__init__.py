"""The checks, a module a group, as `assets`; and what refuses to go on where one of them has failed.

Begin with `blocking` (keeps each result as evidence) and `gate` (the one helper that refuses). Advisory checks only
warn (`advisory`); `alerts` sends notifications; `comparisons` has what models and endpoints are compared by; `serving`
has the job that watches the endpoint, too. Imports no other room: assets, reports and jobs all stand on checks.
"""
