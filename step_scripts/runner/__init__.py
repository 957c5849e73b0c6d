"""What every step stands on: how it is requested, run and stopped, with which code, on which Ray, with which files.

Begin with `contract` (request, context, artifacts, manifest) and `execution` (runs one step: `python -m
step_scripts.runner request.json`). `worker` is the process that runs steps; `processes` has its parent on a laptop,
children and signals. Files: `storage` (by URI; AWS's clients too), `local_files`. Code: `code_version`. Ray:
`ray_session`, `ray_environment`, `cluster_resources`, `ray_data`. Imports no other room.
"""
