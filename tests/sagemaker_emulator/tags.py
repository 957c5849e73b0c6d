"""Tags of SageMaker resources."""

from tests.sagemaker_emulator.common import Call, Handler, Params
from tests.sagemaker_emulator.errors import validation
from tests.sagemaker_emulator.services import Services


class Tags:
    """AddTags, DeleteTags and ListTags."""

    def __init__(self, services: Services) -> None:
        self._tags = services.tags

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {"AddTags": self._add, "DeleteTags": self._delete, "ListTags": self._list}

    def _of(self, call: Call) -> dict[str, str]:
        resource = call.params["ResourceArn"]
        if resource not in self._tags:
            raise validation(f"Could not find resource {resource}.")
        return self._tags[resource]

    def _add(self, call: Call) -> Params:
        tags = self._of(call)
        tags.update({tag["Key"]: tag["Value"] for tag in call.params["Tags"]})
        return {"Tags": _wire(tags)}

    def _delete(self, call: Call) -> Params:
        tags = self._of(call)
        for key in call.params["TagKeys"]:
            tags.pop(key, None)
        return {}

    def _list(self, call: Call) -> Params:
        return {"Tags": _wire(self._of(call))}


def _wire(tags: dict[str, str]) -> list[Params]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]
