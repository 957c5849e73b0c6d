"""What every step stands on: how it is asked, run and stopped, with which code, on which Ray, and where files lie.

Begin with `contract` (request, context, artifacts, manifest) and `execution` (runs one step: `python -m
step_scripts.runner request.json`). `worker` and `keeper` are the processes of a local run.
Files: `storage`, `s3_objects`, `private_files`, `locking`, `file_state`, `disk_space`. Code: `code_version`,
`loaded_code`, `code_check`. Ray: `ray_session`, `session_folder`, `ray_join`, `ray_watch`, `cluster_resources`.
Imports no other room.
"""
