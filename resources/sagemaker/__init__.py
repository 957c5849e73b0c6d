"""SageMaker jobs as Dagster Pipes invocations: one piece of work is one job, found again instead of started twice.

Begin with `pipes_client`. Its calls, in order, for a training or processing job:

1. `job_requests` makes the request of the typed configuration; `jobs` says how the API spells each kind of job.
2. `job_run` names the job, adds tags and environment, and looks for a job that does this work already.
3. `pipes_io` puts the Pipes context on S3 (`job_files`).
4. `job_run` creates the job or attaches to it, and polls until it ends. At each poll it says new statuses and renews
   the lease (`job_files`), which shows that a run waits for the job; `pipes_io` reads messages, `job_reports` log
   lines.
5. `job_reports` says what the job cost, or why it failed. If the run ends before the job, `job_run` stops it.

`tuning_jobs` runs the trials of `tune_model` as a tuning job, in the same order without Pipes. `jobs` lists those
in progress, for teardown and sweep. Imports `aws`.
"""
