"""Versions of models: `base` is the abstract type, `local` and `sagemaker` implement it.

On SageMaker a version is a model package: `model_packages` calls its API, `package_files`, `package_record` and
`package_inventory` say what it holds; `serving_container` is the container that serves it. Imports `aws`.
"""
