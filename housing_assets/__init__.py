"""House prices as a Dagster code location: what is made (assets), judged (checks), launched, shown and removed.

Begin with `definitions` (everything comes together) and `schema` (the table). `settings` reads environment variables,
`deployments` makes resources of them, `config` is the run configuration; `code_location` lets parts ask for the whole.
Rooms, from the top: `automation` and `maintenance`; `assets`; `reporting`; `checks`; `runs`. Each imports those below,
and `resources` and `step_scripts`.
"""
