"""Predictions over HTTP: the application, parsers of requests, captured requests.

Begin with `app` (SageMaker's container contract) and `served_model`; `deployment` is the endpoint's state folder.
Imports `model`, `step_scripts.parameters`, `table` and `runner`; step `serve_model` and the module `inference` (AWS's
own server) use it. It runs in AWS's image, which has neither Ray nor Dagster.
"""
