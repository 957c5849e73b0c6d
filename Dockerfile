# An image of your own for SageMaker jobs and endpoints: everything is installed at build time, nothing at start.
#
#   docker build --platform linux/amd64 -t housing .
#   docker tag housing <account>.dkr.ecr.<region>.amazonaws.com/housing:1 && docker push …
#
# Jobs still get the project's code through S3, so a change of the code needs no new image; a change of versions does.
# The same image answers `train` (tuning jobs: HOUSING_TRAIN_MODULE), `serve` and the entry point of processing jobs.
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

# libgomp1: XGBoost. tini is not needed: bootstrap.sh stays process 1 and reaps.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/housing
COPY pyproject.toml README.md constraints.txt ./
COPY step_scripts step_scripts
COPY housing_assets housing_assets
# pip compiles bytecode: without it Ray's workers start several times slower. The versions are those that
# `make constraints` wrote; a job checks them against those of the Dagster process and installs what differs.
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt boto3 .

# `docker run housing train`, `… serve`, `… step_scripts.cluster` (processing).
EXPOSE 8080
ENTRYPOINT ["/bin/bash", "/opt/housing/step_scripts/bootstrap.sh"]
CMD ["step_scripts.cluster"]
