#!/bin/bash
# Starts the project's code in a container of a SageMaker job, on every host: unpacks the source archive that lies
# beside this script, installs the pinned requirements that the image lacks, runs `python3 -m <module>` (the first
# argument; default step_scripts.cluster) and ends with its status.
#
# Wheels in the channel `wheels`, beside the channel of this script, are used instead of a package index.
# This shell stays process 1: it reaps the processes that others leave behind, which Python would not.
# It is also the entry point of an image that holds the code already (Dockerfile). Then the archive of the training
# channel `code` is used, if there is one; a tuning job has no other way to deliver code. HOUSING_TRAIN_MODULE names
# what the argument `train` runs there.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ -f "$here/source.tar.gz" ] || [ ! -f "${SAGEMAKER_BASE_DIR:-/opt/ml}/input/data/code/source.tar.gz" ] ||
    here="${SAGEMAKER_BASE_DIR:-/opt/ml}/input/data/code"
module="${1:-step_scripts.cluster}"
[ $# -gt 0 ] && shift
case "$module" in
    train) module="${HOUSING_TRAIN_MODULE:-step_scripts.cluster}" ;;  # as SageMaker starts a training image
    serve) module=step_scripts.serve_model; set -- serve "$@" ;;  # and a serving image
esac
export AWS_DEFAULT_REGION="${AWS_DEFAULT_REGION:-${AWS_REGION:-}}"
export PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONDONTWRITEBYTECODE  # without compiled bytecode Ray's workers start several times slower

fail() {
    local root="${SAGEMAKER_BASE_DIR:-/opt/ml}"
    printf 'bootstrap: %s\n' "$1" >&2
    mkdir -p "$root/output"
    # Training jobs show the one, processing jobs the other.
    printf '%s' "${1:0:960}" | tee "$root/output/failure" > "$root/output/message"
    exit 1
}

# One line for each requirement that is not installed in exactly the pinned version.
missing() {
    python3 - "$1" <<'PYTHON'
import importlib.metadata, sys
for line in open(sys.argv[1]):
    name, _, version = line.strip().partition("==")
    try:
        found = importlib.metadata.version(name.partition("[")[0])
    except importlib.metadata.PackageNotFoundError:
        found = None
    if name and found != version:
        print(line.strip())
PYTHON
}

command -v python3 > /dev/null || fail "the image has no python3"
if [ -f "$here/source.tar.gz" ]; then
    target="$(mktemp -d "${TMPDIR:-/tmp}/housing-code-XXXXXX")" || fail "there is no place for the code"
    tar -xzf "$here/source.tar.gz" -C "$target" || fail "the source archive could not be unpacked"
    export PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -f "$here/requirements.txt" ]; then
    absent="$(mktemp "${TMPDIR:-/tmp}/requirements-XXXXXX")" || fail "there is no place for temporary files"
    missing "$here/requirements.txt" > "$absent" || fail "the requirements could not be read"
    if [ -s "$absent" ]; then
        source=()
        [ -d "$here/../wheels" ] && source=(--no-index --find-links "$here/../wheels")
        printf 'installing %s\n' "$(tr '\n' ' ' < "$absent")"
        output="$(python3 -m pip install --quiet "${source[@]}" -r "$absent" 2>&1)" || {
            printf '%s\n' "$output" >&2
            fail "these packages could not be installed: $(tr '\n' ' ' < "$absent"). Use an image that holds them, \
give wheels, or let the job reach a package index. pip: ${output: -300}"
        }
    fi
fi

python3 -m "$module" "$@" &
child=$!
trap 'kill -TERM "$child" 2> /dev/null' TERM INT
# A signal ends `wait` early; the status counts only once the child is gone.
while kill -0 "$child" 2> /dev/null; do
    wait "$child"
done
wait "$child"
exit $?
