#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Check the project on a machine that has CUDA and PyTorch and no network, with wheels that were collected elsewhere.
#
#   .ci_offline.sh collect FOLDER   where there is a network: put wheels for everything but PyTorch into FOLDER
#   .ci_offline.sh run FOLDER       on the other machine: install them, run `pytest -m gpu` and benchmarks/gpu.py
#
#   PYTHON      interpreter; for run the one that has PyTorch (default: python3)
#   FOR_PYTHON  version that the wheels are for, such as 3.12 (default: that of .venv)
#   LEAVE_OUT   names of further packages that the other machine has, so that they need not be carried
#   ALSO        further requirements to carry: "subquadratic-ops-torch-cu13==0.2.1 warp-lang==1.19.0 nanobind==3.1.0"
#   BENCH       arguments of benchmarks/gpu.py; none: its own choice
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ENVIRONMENT=.venv-offline
# PyTorch and what it brings; the style checker and the kernels of Jupyter have no part in tests on a GPU
HAVE='torch|triton|nvidia-(cu|nccl|nv).*|cuda-.*|ruff|uv|pip|evo2-megatron|ipykernel|ipython.*|debugpy|jedi|pysam'

die() {
    echo ".ci_offline.sh: error: $*" >&2
    exit 2
}

collect() {
    [ -x .venv/bin/python ] || die "there is no .venv to take the versions from; run make setup first"
    local version machine tags=() pins skip=$HAVE${LEAVE_OUT:+|${LEAVE_OUT// /|}}
    version=${FOR_PYTHON:-$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
    mkdir -p "$1"
    machine=$(uname -m)
    for tag in 2_28 2_27 2_24 2_17 2_12 2_5; do tags+=(--platform "manylinux_${tag}_$machine"); done
    tags+=(--platform "manylinux2014_$machine" --platform "manylinux1_$machine")
    pins=$(.venv/bin/uv pip freeze --python .venv/bin/python --exclude-editable |
        grep -Ev "^($skip)=="
        for pin in ${ALSO:-}; do echo "$pin"; done)
    while read -r pin; do
        # its own build, if there is no wheel for that platform and version
        .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version "$version" --implementation cp "${tags[@]}" --dest "$1" "$pin" 2>/dev/null ||
            .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1" "$pin" ||
            die "no wheel of $pin for Python $version; name it in LEAVE_OUT if the other machine has it"
    done <<<"$pins"
    # for its list of commands; what is imported is the working tree's
    .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1" .
    echo "$(find "$1" -name '*.whl' | wc -l) wheels, $(du -sm "$1" | cut -f 1) MB, in $1"
}

run() {
    local python=${PYTHON:-python3}
    compgen -G "$1/*.whl" >/dev/null || die "$1 has no wheels; make them with .ci_offline.sh collect"
    "$python" -c 'import torch' 2>/dev/null || die "$python has no PyTorch; set PYTHON to one that has"
    rm -rf $ENVIRONMENT
    "$python" -m venv --system-site-packages --without-pip $ENVIRONMENT
    # an environment made from another does not see it
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' \
        >"$($ENVIRONMENT/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
    "$python" -m pip --python $ENVIRONMENT/bin/python install --quiet --disable-pip-version-check --no-index --no-deps \
        --ignore-installed "$1"/*.whl
    export PYTHONPATH=$PWD/src PATH=$PWD/$ENVIRONMENT/bin:$PATH
    $ENVIRONMENT/bin/python -m pytest -m gpu
    # shellcheck disable=SC2086 # several arguments
    $ENVIRONMENT/bin/python benchmarks/gpu.py ${BENCH:-}
}

case "${1:-}:$#" in
collect:2) collect "$2" ;;
run:2) run "$2" ;;
*) die "say 'collect FOLDER' where there is a network, and 'run FOLDER' on the machine with the GPU" ;;
esac
