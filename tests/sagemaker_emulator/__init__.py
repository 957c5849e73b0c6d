"""A SageMaker emulator that runs the jobs it is given. See README.md."""

from tests.sagemaker_emulator.emulator import SageMakerEmulator
from tests.sagemaker_emulator.faults import Fault, Faults
from tests.sagemaker_emulator.settings import Image, Settings

__all__ = ["Fault", "Faults", "Image", "SageMakerEmulator", "Settings"]
