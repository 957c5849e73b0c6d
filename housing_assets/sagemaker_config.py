"""The file that `HOUSING_SAGEMAKER_CONFIG` names: every field of the SageMaker resources, in a section a resource."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from housing_assets.config_fields import suggestion, unknown_fields
from housing_assets.settings import Settings, yaml_file

SECTIONS = ("compute", "feature_store", "model_registry", "endpoint_host")


def load_sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the file says, by resource; nothing for each of them if there is none.

    Raises `ValueError` naming every section and field that there is not.
    """
    empty: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    path = settings.text("HOUSING_SAGEMAKER_CONFIG")
    if path is None:
        return empty
    content = yaml_file("HOUSING_SAGEMAKER_CONFIG", path)
    if not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r} must hold sections with fields, as YAML")
    if unknown := sorted(str(name) for name in set(content) - set(SECTIONS)):
        wrong = ". ".join(f"{name} is unknown{suggestion(name, SECTIONS)}" for name in unknown)
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r}: {wrong}")
    models = _section_models()
    if problems := [p for name, section in content.items() for p in unknown_fields(models[name], section, name)]:
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r}: {'. '.join(problems)}")
    return empty | {name: dict(section) for name, section in content.items()}


def _section_models() -> dict[str, type[BaseModel]]:
    from resources.compute.sagemaker import SageMakerCompute
    from resources.endpoints.sagemaker import SageMakerEndpointHost
    from resources.feature_store.sagemaker import SageMakerFeatureStore
    from resources.model_registry.sagemaker import SageMakerModelRegistry

    models = (SageMakerCompute, SageMakerFeatureStore, SageMakerModelRegistry, SageMakerEndpointHost)
    return dict(zip(SECTIONS, models, strict=True))
