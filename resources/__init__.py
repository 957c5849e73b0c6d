"""Backends of the assets: abstract types, each with a local and a SageMaker implementation.

Begin with `compute.base`, `feature_store.base`, `model_registry.base` and `endpoints.base`; a backend's module lies
beside each. `sagemaker` runs jobs, `aws` is below everything on AWS, `references` is what assets hand to each other,
`sources` finds files, `services` are what a run can do without, `waiting` waits for states. Knows
nothing of house prices.
"""
