"""The hyperparameter search and the final fit.

Begin with `search` (Ray Tune), `engines` (the final fit, by Ray Train or xgboost_ray) and `boosting` (what all fits
have in common). Imports `model`, `step_scripts.parameters`, `table` and `runner`; step `tune_model` uses it.
"""
