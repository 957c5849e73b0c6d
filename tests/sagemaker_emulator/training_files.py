"""Files of a training job: what the hosts find below /opt/ml, and the artifacts that are made of what they leave."""

from collections.abc import Sequence

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import BotoCoreError, ClientError

from tests.sagemaker_emulator.cluster import Cluster, HostPlan, resource_config
from tests.sagemaker_emulator.common import Params, pick
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.jobs import write_json
from tests.sagemaker_emulator.storage import InputError, Storage


def fill_hosts(storage: Storage, request: Params, cluster: Cluster, plans: Sequence[HostPlan]) -> None:
    """Write the configuration files and download the channels."""
    channels = request.get("InputDataConfig", [])
    default_mode = request["AlgorithmSpecification"]["TrainingInputMode"]
    described = {
        channel["ChannelName"]: {
            "TrainingInputMode": channel.get("InputMode", default_mode),
            "S3DistributionType": _source(channel).get("S3DataDistributionType", "FullyReplicated"),
            "RecordWrapperType": "None",
            **pick(channel, ["ContentType"]),
        }
        for channel in channels
    }
    for host, plan in zip(cluster.hosts, plans, strict=True):
        config = host.ml / "input" / "config"
        write_json(config / "resourceconfig.json", resource_config(plans, plan, cluster.interface))
        write_json(config / "hyperparameters.json", request.get("HyperParameters", {}))
        write_json(config / "inputdataconfig.json", described)
        for directory in ("input/data", "model", "output/data", "checkpoints"):
            (host.ml / directory).mkdir(parents=True, exist_ok=True)
    for channel in channels:
        source = _source(channel)
        wanted = source.get("InstanceGroupNames")
        chosen = [h for h, p in zip(cluster.hosts, plans, strict=True) if not wanted or p.group in wanted]
        storage.download(
            source["S3Uri"],
            source["S3DataType"],
            [host.ml / "input" / "data" / channel["ChannelName"] for host in chosen],
            sharded=source.get("S3DataDistributionType") == "ShardedByS3Key",
        )


def upload_artifacts(storage: Storage, request: Params, base: str, hosts: Sequence[Host]) -> None:
    """Upload what all hosts together left in /opt/ml/model and /opt/ml/output/data."""
    try:
        if request["OutputDataConfig"].get("CompressionType") == "NONE":
            for host in reversed(hosts):
                storage.upload_tree(host.ml / "model", f"{base}/model")
        else:
            storage.upload_archive([host.ml / "model" for host in hosts], f"{base}/model.tar.gz")
        if any(any((host.ml / "output" / "data").iterdir()) for host in hosts):
            storage.upload_archive([host.ml / "output" / "data" for host in hosts], f"{base}/output.tar.gz")
    except (ClientError, BotoCoreError, S3UploadFailedError, OSError) as error:
        raise InputError(f"ClientError: Artifact upload failed: {error}") from error


def _source(channel: Params) -> Params:
    return channel["DataSource"]["S3DataSource"]
