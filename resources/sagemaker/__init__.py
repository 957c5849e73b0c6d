"""SageMaker jobs as Dagster Pipes invocations: client, requests, names, logs, code delivery."""
