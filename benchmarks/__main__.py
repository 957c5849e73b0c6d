"""`python -m benchmarks [--pairs 1]`: all benchmarks in a small form, one after the other."""

from __future__ import annotations

import argparse

from benchmarks import (
    article,
    code_location,
    endpoint,
    feature_store,
    final_fit,
    growth,
    ingestion,
    overhead,
    plain_script,
    second_run,
    tuning,
    two_hosts,
    whole_graph,
)

options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
options.add_argument("--pairs", default="1", help="pairs of each comparison, after one that is not counted (default 1)")
pairs = ["--pairs", options.parse_args().pairs]

code_location.main([])
overhead.main(["--repeats", "1"])
whole_graph.main(["--rows", "10000"])
tuning.main(pairs)
final_fit.main([*pairs, "--rows", "200000"])
ingestion.main([*pairs, "--rows", "200000"])
feature_store.main([*pairs, "--rows", "2000"])
two_hosts.main([*pairs, "--rows", "200000"])
endpoint.main([*pairs, "--seconds", "3"])
second_run.main(pairs)
plain_script.main(pairs)
article.main(pairs)
growth.main(["--rows", "10000", "100000"])
