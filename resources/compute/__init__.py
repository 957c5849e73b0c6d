"""Compute backends: where steps run."""
