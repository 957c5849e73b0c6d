"""The one exception that becomes an AWS error response."""


class ApiError(Exception):
    """An AWS error: code, message and HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400, **extra: object) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.extra = extra


def validation(message: str) -> ApiError:
    """SageMaker's ValidationException."""
    return ApiError("ValidationException", message)


def in_use(message: str) -> ApiError:
    """SageMaker's ResourceInUse."""
    return ApiError("ResourceInUse", message)


def not_found(message: str) -> ApiError:
    """SageMaker's ResourceNotFound."""
    return ApiError("ResourceNotFound", message)


def not_emulated(what: str) -> ApiError:
    """Refusal of something SageMaker knows and the emulator does not do."""
    return ApiError("NotEmulated", f"The SageMaker emulator does not emulate {what}.")
