"""SageMaker jobs as Dagster Pipes invocations: one piece of work is one job, found again instead of started twice.

Begin with `pipes_client`. Its calls, in order, for a training or processing job:

1. `job_requests` makes the request of the typed configuration; the client adds name (`job_names`), tags, environment.
2. `job_search` looks for a job that does this work already; an orphan's `job_lease` says that nobody attends to it.
3. `job_files` puts inputs on S3; `pipes_io` puts the Pipes context there, and reads the messages.
4. The job is created, or attached to. Then, until it ends: `pipes_io` messages, `job_logs`, the lease, and `job_watch`,
   which reports status changes, at the intervals of `job_polling`.
5. `job_metadata` says what it cost; `job_failures` why it failed. In any other end `job_stop` stops it.

`job_kinds` has what differs between training, processing and tuning jobs. `native_tuning` runs the trials as a tuning
job, by `tuning_client` and `tuning_requests`. `job_inventory` lists the jobs in progress, for teardown and sweep.
Imports `aws`.
"""
