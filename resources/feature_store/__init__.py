"""Feature groups: `base` is the abstract type, `local` and `sagemaker` implement it.

`feature_groups` has SageMaker's groups and their tables in Glue. Imports `references` and `aws`.
"""
