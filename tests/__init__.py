"""Tests of the platform, and the emulated SageMaker that they run on."""
