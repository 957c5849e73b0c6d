"""What every step stands on: how it is requested, run and stopped, with which code, on which Ray, with which files.

Begin with `contract` (request, context, artifacts, manifest) and `execution` (runs one step: `python -m
step_scripts.runner request.json`). `worker` is the process that runs steps, `keeper` its parent on a laptop.
Files: `storage`, `s3_objects`, `local_files`, `partition_files`, `locking`. Code: `code_version`, `loaded_code`.
Processes and threads: `processes`. Ray: `ray_session`, `ray_environment`, `cluster_resources`, `ray_data`. Imports no
other room.
"""
