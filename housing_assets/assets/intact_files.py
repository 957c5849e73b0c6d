"""Are the files that a model's registration rests on still those that were written?"""

import dagster as dg

from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files


def require_intact(**artifacts: Artifact | None) -> None:
    """Read all files of the artifacts, by the names of their assets. Raises `Failure` naming a damaged one."""
    for asset, artifact in artifacts.items():
        try:
            if artifact is not None:
                check_files(artifact, "all")
        except DamagedArtifactError as error:
            raise dg.Failure(
                f"{asset} is damaged: {error}. Nothing was registered. Materialize {asset} again, with "
                "HOUSING_CACHE=0, and what follows from it",
                allow_retries=False,
            ) from error
