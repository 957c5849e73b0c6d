"""The trials of one search: numbers them, keeps and reports each that ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

from step_scripts.runner.contract import Reporter
from step_scripts.training.trial_records import TrialRecord, TrialStore

_HOPELESS_AFTER = 3  # failed trials, and none that was completed


class TrialLedger:
    """`records` holds what ended, in that order; at first the trials that an earlier attempt has `finished`."""

    def __init__(self, finished: list[TrialRecord], store: TrialStore | None, log: Reporter, num_trials: int) -> None:
        self.records = list(finished)
        self.num_trials = num_trials
        self._store, self._log = store, log
        taken = {record.trial for record in finished}
        self._free_numbers: Iterator[int] = (number for number in count(1) if number not in taken)
        self._last_message = time.monotonic()

    @property
    def remaining(self) -> int:
        """Trials that have not ended."""
        return self.num_trials - len(self.records)

    @property
    def hopeless(self) -> bool:
        """Whether nothing but failures can be expected of more trials."""
        return len(self.records) >= _HOPELESS_AFTER and all(r.status == "failed" for r in self.records)

    @property
    def silent_seconds(self) -> float:
        """Since the last message."""
        return time.monotonic() - self._last_message

    def next_number(self) -> int:
        """The number of a trial that begins."""
        return next(self._free_numbers)

    def add(self, record: TrialRecord) -> None:
        """Record, keep and report a trial that ended."""
        if self._store is not None and record.status == "completed":
            try:
                self._store.save(record)
            except OSError as error:
                self._log.warning(f"trial {record.trial} could not be kept for a resume: {error}")
        self.records.append(record)
        self.say(f"{len(self.records)} of {self.num_trials} done, {record.describe()}")

    def say(self, message: str) -> None:
        """Report something else."""
        self._log.info(message)
        self._last_message = time.monotonic()
