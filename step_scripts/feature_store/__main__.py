"""Commands for a local feature store: `python -m step_scripts.feature_store replay|import ROOT GROUP`."""

from __future__ import annotations

import argparse
import logging
import sys

from step_scripts.feature_store.local_group import LocalGroup
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.takeover import replay, take_over
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 1 if it was refused."""
    parser = argparse.ArgumentParser(prog="python -m step_scripts.feature_store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("replay", "make the table of a group anew that has been moved, with all snapshots; reads no data"),
        ("import", "take over a group in the layout of earlier versions, with its history and deletions"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("root", help="folder of the feature groups")
        command.add_argument("group", help="name of the feature group")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        group = OfflineStore(given.root).folder(given.group)
        if not isinstance(group, LocalGroup):
            raise StepError(
                f"{given.root} is on S3: a table there is SageMaker's, which can neither be moved nor made of a "
                "feature group that has none. Use another group name and ingest the sources again"
            )
        if given.command == "replay":
            logging.info("%s replayed in %s", counted(replay(group), "snapshot"), group.path)
        else:
            logging.info("%s taken over in %s", counted(take_over(group), "commit"), group.path)
    except StepError as error:
        logging.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
