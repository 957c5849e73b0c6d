"""Tests of the platform, and the emulated SageMaker that they run on."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The project's folder."""
