"""Running a step: `base` is the abstract type, `local_ray` and `sagemaker` implement it.

Imports `resources.sagemaker` and `aws`; the only room that starts jobs.
"""
