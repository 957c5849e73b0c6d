"""The hyperparameter search and the final fit.

Begin with `search` (by Ray Tune; `trials`: what is tried and what came of it; `search_trials`: what runs in an actor),
`engines` (the final fit, by Ray Train or xgboost_ray) and `boosting` (what all fits have in common). Imports `model`,
`step_scripts.parameters`, `table` and `runner`; steps `tune_model` and `tune_trial` use it.
"""
