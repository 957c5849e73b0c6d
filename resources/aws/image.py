"""The image of jobs: the configured one, or AWS's XGBoost image of the region."""

from __future__ import annotations

import functools

import dagster as dg

XGBOOST_IMAGE_VERSION = "3.2-0"  # XGBoost 3.2.0, which the project pins; Python 3.12; no Ray


@functools.cache
def job_image(configured: str | None, region: str) -> str:
    """URI of the image. Raises `dagster.Failure` if it cannot be known, with what to do."""
    if configured:
        return configured
    try:
        from sagemaker.core import image_uris  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise dg.Failure(
            "no image is configured, and the package that knows AWS's images is not there: "
            "pip install 'housing-assets[sagemaker]', or configure a custom image, built from the Dockerfile",
            allow_retries=False,
        ) from error
    try:
        return image_uris.retrieve("xgboost", region, version=XGBOOST_IMAGE_VERSION, image_scope="training")
    except ValueError as error:
        raise dg.Failure(
            f"there is no XGBoost image {XGBOOST_IMAGE_VERSION} for {region}: {error}. Configure a custom image",
            allow_retries=False,
        ) from error
