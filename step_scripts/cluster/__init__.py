"""The Ray cluster inside a SageMaker job, formed by the job's hosts: `python -m step_scripts.cluster` on each.

Begin with `__main__` (a host from start to end), then `head` and `node`. `job` has the job's hosts, files,
limits and failures, `status` what the hosts tell each other. Imports `runner` only.
"""
