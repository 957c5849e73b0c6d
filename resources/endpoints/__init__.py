"""Serving a version: `base` is the abstract type, `local` and `sagemaker` implement it.

Local: `server_process`, and `hot_swap` from one model to the next. SageMaker: `endpoint_requests` makes the requests,
`endpoint_parts` the configurations and models, `rollout` replaces a version, `invocation` calls. Imports
`model_registry` and `aws`.
"""
