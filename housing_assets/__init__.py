"""Dagster assets of the housing price platform."""
