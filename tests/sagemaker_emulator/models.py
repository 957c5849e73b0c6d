"""Models and endpoint configurations: what endpoints are made of."""

import threading

from tests.sagemaker_emulator.common import Call, Handler, Listing, Params, arn, list_page, now, pick
from tests.sagemaker_emulator.errors import not_emulated, validation
from tests.sagemaker_emulator.registry import Registry
from tests.sagemaker_emulator.services import Services

_MODELS = Listing("Models", "ModelName")
_CONFIGS = Listing("EndpointConfigs", "EndpointConfigName")
_MODEL_ECHOED = ("ModelName", "PrimaryContainer", "Containers", "ExecutionRoleArn", "VpcConfig",
                 "EnableNetworkIsolation")  # fmt: skip
_CONFIG_ECHOED = ("EndpointConfigName", "ProductionVariants", "DataCaptureConfig", "KmsKeyId", "ExecutionRoleArn",
                  "VpcConfig", "EnableNetworkIsolation")  # fmt: skip


class Models:
    """Create, describe, list and delete models and endpoint configurations."""

    def __init__(self, services: Services, registry: Registry) -> None:
        self._services = services
        self._registry = registry
        self._lock = threading.Lock()
        self._models: dict[str, Params] = {}
        self._configs: dict[str, Params] = {}

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateModel": self._create_model,
            "DescribeModel": lambda call: dict(self.model(call.region, call.params["ModelName"])),
            "ListModels": self._list_models,
            "DeleteModel": self._delete_model,
            "CreateEndpointConfig": self._create_config,
            "DescribeEndpointConfig": lambda call: dict(self.config(call.region, call.params["EndpointConfigName"])),
            "ListEndpointConfigs": self._list_configs,
            "DeleteEndpointConfig": self._delete_config,
        }

    def model(self, region: str, name: str) -> Params:
        """A model, or AWS's error."""
        key = arn(region, "model", name)
        if key not in self._models:
            raise validation(f'Could not find model "{key}".')
        return self._models[key]

    def config(self, region: str, name: str) -> Params:
        """An endpoint configuration, or AWS's error."""
        key = arn(region, "endpoint-config", name)
        if key not in self._configs:
            raise validation(f'Could not find endpoint configuration "{key}".')
        return self._configs[key]

    def container(self, region: str, model_name: str) -> Params:
        """The container of a model, with what a model package says filled in, and the model's role."""
        model = self.model(region, model_name)
        container = dict(model.get("PrimaryContainer") or model["Containers"][0])
        if package := container.get("ModelPackageName"):
            specification = self._registry.find(region, package).get("InferenceSpecification", {})
            first = specification.get("Containers", [{}])[0]
            given = container.get("Environment", {})
            container = {**first, **container, "Environment": {**first.get("Environment", {}), **given}}
        return {**container, "ExecutionRoleArn": model.get("ExecutionRoleArn")}

    def _create_model(self, call: Call) -> Params:
        params = call.params
        containers = [*filter(None, [params.get("PrimaryContainer")]), *params.get("Containers", [])]
        if not containers:
            raise validation("Either PrimaryContainer or Containers must be specified.")
        if len(containers) > 1:
            raise not_emulated("inference pipelines of several containers")
        container = containers[0]
        if container.get("Mode", "SingleModel") != "SingleModel" or container.get("MultiModelConfig"):
            raise not_emulated("multi-model containers")
        if container.get("AdditionalModelDataSources"):
            raise not_emulated("AdditionalModelDataSources")
        if package := container.get("ModelPackageName"):
            self._registry.find(call.region, package)
        elif not container.get("Image"):
            raise validation("Either Image or ModelPackageName must be specified for a container.")
        key = arn(call.region, "model", params["ModelName"])
        with self._lock:
            if key in self._models:
                raise validation(f'Cannot create already existing model "{key}".')
            self._models[key] = {**pick(params, _MODEL_ECHOED), "ModelArn": key, "CreationTime": now()}
        self._services.tag(key, params.get("Tags"))
        return {"ModelArn": key}

    def _list_models(self, call: Call) -> Params:
        prefix = arn(call.region, "model", "")
        with self._lock:
            found = [m for key, m in self._models.items() if key.startswith(prefix)]
        items = [pick(model, ("ModelName", "ModelArn", "CreationTime")) for model in found]
        return list_page(call.params, items, _MODELS)

    def _delete_model(self, call: Call) -> Params:
        model = self.model(call.region, call.params["ModelName"])
        with self._lock:
            self._models.pop(model["ModelArn"], None)
        return {}

    def _create_config(self, call: Call) -> Params:
        params = call.params
        for member in ("AsyncInferenceConfig", "ExplainerConfig", "ShadowProductionVariants"):
            if params.get(member):
                raise not_emulated(f"{member} of endpoints")
        names = [variant["VariantName"] for variant in params["ProductionVariants"]]
        if len(names) != len(set(names)):
            raise validation("Production variant names must be unique.")
        for variant in params["ProductionVariants"]:
            if not variant.get("ModelName"):
                raise not_emulated("production variants without a model (inference components)")
            self.model(call.region, variant["ModelName"])
            serverless = variant.get("ServerlessConfig")
            if bool(serverless) == bool(variant.get("InstanceType")):
                raise validation("Exactly one of InstanceType and ServerlessConfig must be given for a variant.")
        key = arn(call.region, "endpoint-config", params["EndpointConfigName"])
        with self._lock:
            if key in self._configs:
                raise validation(f'Cannot create already existing endpoint configuration "{key}".')
            config = {**pick(params, _CONFIG_ECHOED), "EndpointConfigArn": key, "CreationTime": now()}
            self._configs[key] = config
        self._services.tag(key, params.get("Tags"))
        return {"EndpointConfigArn": key}

    def _list_configs(self, call: Call) -> Params:
        prefix = arn(call.region, "endpoint-config", "")
        with self._lock:
            found = [c for key, c in self._configs.items() if key.startswith(prefix)]
        items = [pick(config, ("EndpointConfigName", "EndpointConfigArn", "CreationTime")) for config in found]
        return list_page(call.params, items, _CONFIGS)

    def _delete_config(self, call: Call) -> Params:
        config = self.config(call.region, call.params["EndpointConfigName"])
        with self._lock:
            self._configs.pop(config["EndpointConfigArn"], None)
        return {}
