"""How does this version compare with an earlier one?

`python -m benchmarks.earlier [--commit COMMIT] [--work graph|ingestion|again|code_location] [--rows 10000]
[--rounds 100]`. The earlier version is checked out beside this one and runs in the same environment, with its own copy
of the same benchmark. `graph`: a first run of all assets with 8 trials. `ingestion`: CSV to validated rows, feature
store and splits, on a Ray session that is there. `again`: an unchanged run after a first one. `code_location`: its
import.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.code_location import seconds_of
from benchmarks.ingestion import steps
from benchmarks.measuring import ROOT, Side, compare, parser
from benchmarks.second_run import again, first
from benchmarks.whole_graph import whole_run
from housing_assets.sample_data import write_sample

# The last one whose data plane was made by hand: before Ray Data and Iceberg.
COMMIT = "9af9b9a"


def code_location() -> dict[str, Any]:
    """Import the code location in a process of its own."""
    return {"figures": {"seconds": seconds_of("housing_assets.definitions")}}


def unchanged(folder: str, source: str) -> dict[str, Any]:
    """An unchanged run after a first one, which is not counted."""
    first(folder, source)
    return again(folder, source)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of an earlier commit, with this version's `benchmarks` where they know more."""
    with tempfile.TemporaryDirectory(prefix="housing-earlier-") as name:
        tree = Path(name, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            for module in ("earlier", "code_location"):
                (tree / "benchmarks" / f"{module}.py").write_bytes((ROOT / "benchmarks" / f"{module}.py").read_bytes())
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main(arguments: list[str] | None = None) -> None:
    """Compare this version with the earlier one."""
    options = parser(__doc__, rows=10_000)
    options.add_argument("--commit", default=COMMIT, help="the earlier version (default %(default)s)")
    options.add_argument("--work", choices=("graph", "ingestion", "again", "code_location"), default="graph")
    options.add_argument("--source", type=Path, help="CSV file to use instead of generated rows")
    options.add_argument(
        "--rounds",
        type=int,
        help="rounds that every trial of `graph` boosts: both sides then have the same trials where trials are long "
        "enough for ASHA, which stops them in the order of their arrival",
    )
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name, checked_out(chosen.commit) as tree:
        source = str((chosen.source or write_sample(Path(name, "sales.csv"), rows=chosen.rows)).absolute())
        rounds = {"rounds": chosen.rounds, "all_rounds": True} if chosen.rounds else {}
        works: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], dict[str, float]]] = {
            "graph": (whole_run, {"source": source, "trials": 8, **rounds}, {"rmse": 0.01 if rounds else 0}),
            "ingestion": (steps, {"source": source}, {"rows": 0, "train_rows": 0}),
            "again": (unchanged, {"folder": f"{name}/platform", "source": source}, {"rmse": 0}),
            "code_location": (code_location, {}, {}),
        }
        function, work, agree = works[chosen.work]
        compare(
            f"earlier_{chosen.work}",
            Side("this version", function, work),
            Side(f"commit {chosen.commit}", function, work, root=tree),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            agree=agree,
            rows=None if chosen.work == "code_location" or chosen.source else chosen.rows,
            rounds=chosen.rounds,
            source=str(chosen.source) if chosen.source else None,
        )


if __name__ == "__main__":
    main()
