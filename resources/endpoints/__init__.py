"""Serving a version: `base` is the abstract type, `local` and `sagemaker` implement it.

Local: `local_rollout` replaces a version, `server_process` starts and asks servers. SageMaker: `endpoint_requests`
holds the configuration and the requests made of it, `endpoint_parts` makes the calls.

Imports `model_registry` and `aws`.
"""
