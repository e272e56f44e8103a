#!/bin/sh
# Install KVFetcher into an existing server environment without touching what is there.
#
#   install.sh VENV SOURCE      $PIP_ARGS are pip's own options
#
# Every package that VENV already has is pinned to its version while pip resolves: pip either adds what
# is missing, or stops and says which requirement cannot be met beside TensorRT-LLM's.
set -eu
venv=$1
source=$2
python="$venv/bin/python3"
pins=$(mktemp)
trap 'rm -f "$pins" "$pins.after"' EXIT

# Packages from local files (NVIDIA's own torch) have no name==version line, and cannot be pinned by
# one: they are compared afterwards instead.
"$python" -m pip list --format=freeze >"$pins"
# shellcheck disable=SC2086  # PIP_ARGS are several words
"$python" -m pip install --no-cache-dir ${PIP_ARGS:-} --constraint "$pins" \
    "${source}[codec,redis,s3,gpu]"
"$python" -m pip list --format=freeze >"$pins.after"

changed=$(grep -vxFf "$pins.after" "$pins" | grep -v '^kvfetcher==' || true)
if [ -n "$changed" ]; then
    echo "these packages of the image were changed or removed: $changed" >&2
    exit 1
fi
"$python" -c 'import kvfetcher.trtllm_connector, kvfetcher.config'
