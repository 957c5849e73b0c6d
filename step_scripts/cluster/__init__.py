"""The Ray cluster inside a SageMaker job, formed by the job's hosts: `python -m step_scripts.cluster` on each.

Begin with `__main__` (a host from start to end), then `head` and `node` (the workers' part, and what the hosts tell
each other). `job` has the job's hosts, files, limits and failures. Imports `runner` only.
"""
