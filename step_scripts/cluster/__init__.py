"""The Ray cluster inside a SageMaker job, formed by the job's hosts: `python -m step_scripts.cluster` on each.

Begin with `program` (a host's life), then `head`, `roles` and `driver`. Imports `runner` only.
"""
