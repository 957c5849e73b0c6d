"""The model artifact, which training writes and everything that predicts reads, and XGBoost's native interface.

Begin with `artifact`. Imports `step_scripts.parameters`, `table` and `runner`.
"""
