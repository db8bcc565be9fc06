#!/bin/sh
# Build the peer's environment in a folder of its own: mergekit 0.1.5 on the torch of the stored cases.
#
#     tests/peer/build_peer.sh FOLDER [PYTHON]
#
# Nothing of geomerge depends on it: only make_cases.py and the benchmarks against the peer use it.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 FOLDER [PYTHON]" >&2
    exit 2
fi
folder=$1
python=${2:-python3.11}

"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet --upgrade pip
# torch first, so that the peer's own requirement finds it satisfied and does not choose another version.
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet mergekit==0.1.5 transformers==5.23.0 safetensors==0.8.0
"$folder/bin/python" -c 'import mergekit.merge' || { echo "mergekit does not import in $folder" >&2; exit 1; }
"$folder/bin/pip" list 2>/dev/null | grep -iE '^(torch|mergekit|transformers|safetensors|numpy) '
