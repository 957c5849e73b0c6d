"""Versions of models: `base` is the abstract type, `local` and `sagemaker` implement it.

On SageMaker a version is a model package: `model_packages` calls its API, `package_files` says what is kept of it on
S3, and which container serves it. Imports `aws`.
"""
