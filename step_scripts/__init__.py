"""Steps of the training pipeline. A step knows Ray and data; it does not know Dagster's definitions or its backend."""

from step_scripts.runner import code_version

code_version.install()
