"""Deterministic job names: running the same work again finds the job that does it already."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LIMIT = 63
_SUFFIX = 5  # room for `-9999`
_DIGEST = 10


@dataclass(frozen=True)
class Work:
    """What a job is for: assets, partition and a digest of the request. The same in every run that does it."""

    assets: Sequence[str]
    partition: str | None
    request_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, hexadecimal."""
        return digest_of([sorted(self.assets), self.partition, self.request_digest])


@dataclass(frozen=True)
class JobName:
    """A job's name without the suffix of later attempts. `work` is the part that all runs share."""

    work: str
    root_run: str

    @property
    def base(self) -> str:
        """The first attempt's name."""
        return f"{self.work}-{self.root_run}" if self.root_run else self.work

    def attempts(self) -> Iterator[str]:
        """The names of the attempts: base, base-2, base-3 …"""
        yield self.base
        for number in range(2, 10_000):
            yield f"{self.base}-{number}"


def job_name(prefix: str, work: Work, root_run_id: str) -> JobName:
    """`<prefix>-<asset>-<digest of the work>-<digest of the root run>`, at most 58 characters of `[a-zA-Z0-9-]`.

    The readable part is cut if need be; the digests never are. Whether a job of that name does this work is decided
    by its tags, which hold the whole digest.
    """
    digests = f"{work.digest[:_DIGEST]}-{digest_of(root_run_id)[:_DIGEST]}"
    readable = slug("-".join([prefix, *sorted(work.assets)]))[: LIMIT - _SUFFIX - len(digests) - 1].rstrip("-")
    return JobName(f"{readable}-{work.digest[:_DIGEST]}" if readable else work.digest[:_DIGEST], digests[_DIGEST + 1 :])


def tuning_job_name(work: Work, root_run_id: str) -> JobName:
    """`tune-<digest of the work>-<digest of the root run>`: names of tuning jobs have at most 32 characters."""
    return JobName(f"tune-{work.digest[:_DIGEST]}", digest_of(root_run_id)[:_DIGEST])


def given_name(name: str) -> JobName:
    """A name that the caller chose. Later attempts get a suffix too, so it may have at most 58 characters."""
    if len(name) > LIMIT - _SUFFIX:
        raise ValueError(
            f"job name {name!r} has {len(name)} characters; at most {LIMIT - _SUFFIX} leave room for the suffix "
            f"of later attempts (SageMaker allows {LIMIT})"
        )
    return JobName(name, "")


def slug(text: str) -> str:
    """`text` with everything that a job name may not hold replaced by single hyphens."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")


def request_digest(params: Mapping[str, Any]) -> str:
    """Digest of a create request without its name and tags."""
    names = ("TrainingJobName", "ProcessingJobName", "HyperParameterTuningJobName", "Tags")
    kept = {key: value for key, value in params.items() if key not in names}
    return digest_of(kept)


def digest_of(value: object) -> str:
    """SHA-256 of the value's canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
