"""Step `prepare_splits`: every record of the feature store goes to train, validation or test by a hash of its id.

One pass of Ray Data over the store, without a shuffle: each task reads a block, writes the block's three parts, and
returns partial statistics of its training rows. Only where the store may hold several events of one record is it found
out first which rows count (`latest_events`).
"""

from __future__ import annotations

from dataclasses import replace

from step_scripts.data.splits import SPLITS, TIMES, SplitPlan, SplitReport, latest_events, split_outcome, split_rows
from step_scripts.parameters import PrepareSplitsParams
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepDefinition, StepOutcome
from step_scripts.runner.ray_data import Progress, parquet_blocks
from step_scripts.table.distributions import TableSketch

_SMALLEST_DIVIDED_BLOCK = 1000


def run(context: StepContext, params: PrepareSplitsParams) -> StepOutcome:
    """Write the three splits and the training split's statistics.

    Raises `StepError` if a split would be empty, or a file lacks a column.
    """
    table, features = params.table, context.inputs["features"]
    nullable = [column.name for column in table.columns if column.nullable]
    columns = dict.fromkeys(("record_id", "event_time", "is_deleted", *table.column_names))
    with context.phase("plan"):
        blocks = parquet_blocks(
            features, [name for name in columns if name not in nullable], optional=(*TIMES[1:], *nullable)
        )
        plan = SplitPlan(
            params=params,
            uris={split: context.output_uri(split) for split in SPLITS},
            files_per_block=2 if blocks.count == 1 and blocks.rows >= _SMALLEST_DIVIDED_BLOCK else 1,
            places=blocks.files,
        )
    scratch_uri = storage.join(context.attempt_uri, "scratch")
    if params.deduplicate:
        with context.phase("exchange"):
            events = blocks.select("record_id", "is_deleted", *TIMES)
            plan = replace(plan, latest=latest_events(events, params.as_of, scratch_uri, context.log))
    with context.phase("split"):
        progress = Progress(context.log, "prepare_splits", blocks.rows)
        found: dict[int, SplitReport] = {}
        sketch = TableSketch.empty(len(plan.statistics_columns))
        for place, report in blocks.each(split_rows, plan, progress=progress):
            sketch = sketch.merge(report.sketch)  # at once, so that only one is held
            found[place] = replace(report, sketch=TableSketch.empty(0))
    storage.delete_folder(scratch_uri)
    return split_outcome(context, plan, [found[place] for place in sorted(found)], sketch)


STEP = StepDefinition(params=PrepareSplitsParams, run=run, inputs=("features",), outputs=(*SPLITS, "statistics"))
