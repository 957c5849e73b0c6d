"""The hyperparameter search and the final fit.

Begin with step `tune_model`; `trials` (what is tried, and what came of it), `search` (how Ray Tune runs it), `engines`
(the final fit, by Ray Train or xgboost_ray) and `boosting` (what all fits have in common). Imports `model`,
`step_scripts.parameters`, `table` and `runner`.
"""
