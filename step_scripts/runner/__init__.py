"""What every step stands on: how it is requested, run and stopped, with which code, on which Ray, with which files.

Begin with `contract` (request, context, artifacts, manifest) and `execution` (runs one step: `python -m
step_scripts.runner request.json`). `worker` and `keeper` are the processes of a local run.
Files: `storage`, `s3_objects`, `private_files`, `locking`, `disk_space`. Code: `code_version`, `loaded_code`.
Ray: `ray_session`, `session_folder`, `ray_join`, `ray_watch`, `cluster_resources`. Ray Data: `ray_data`, `operators`.
Imports no other room.
"""
