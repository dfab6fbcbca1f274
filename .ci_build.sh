#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build .venv in this folder with everything that the commands, tests and examples need. A second run does nothing.
# Needs Python 3.10 to 3.12 and a C compiler; no root, no Docker. To start over, remove .venv.
#
#   EVO2_BUILD      cpu, cuda12, cuda13 or image (NVIDIA's PyTorch container; its torch and Transformer Engine stay);
#                   not set: image in that container, else CUDA as the driver allows, else cpu
#   PYTHON          interpreter to build with; not set: what fits of python3, python3.12, python3.11, python3.10
#   PIP_FIND_LINKS  folders with wheels; a torch wheel found there is taken
#   PIP_INDEX_URL   a package index to use instead of the usual one
#   CUDA_HOME       toolkit that compiles Transformer Engine; not set: the one of nvcc on the PATH, or /usr/local/cuda
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH=${PATH//"$PWD/.venv/bin:"/} # what is about to be replaced, if it is active, cannot build itself

UV=uv==0.13.8         # fast; unlike pip it can leave packages out, and knows where torch's CPU builds are
MARK=.venv/evo2-build # "building", then what was built: kind, and hash of what decides the result

die() {
    echo ".ci_build.sh: error: $*" >&2
    exit 2
}

has_gpu() { # nvcc on the PATH says nothing about a GPU
    nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

choose_kind() {
    if [ -n "${EVO2_BUILD:-}" ]; then
        echo "$EVO2_BUILD"
    elif [ -n "${NVIDIA_PYTORCH_VERSION:-}" ]; then
        echo image
    elif has_gpu; then
        local driver
        driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
        # the oldest drivers that run CUDA 13 and CUDA 12
        if [ "${driver%%.*}" -ge 580 ]; then echo cuda13; elif [ "${driver%%.*}" -ge 525 ]; then echo cuda12; else
            die "driver $driver is too old for torch; install 525 or newer, or build with EVO2_BUILD=cpu"
        fi
    else
        echo cpu
    fi
}

choose_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.10)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.10, 3.11 or 3.12 is needed and ${PYTHON:-python3} is none of them; set PYTHON to one"
}

choose_toolkit() {
    local folder nvcc
    nvcc=$(command -v nvcc || true)
    for folder in "${CUDA_HOME:-}" "${nvcc:+$(dirname "$(dirname "$(readlink -f "$nvcc")")")}" /usr/local/cuda; do
        if [ -x "$folder/bin/nvcc" ] && [ -e "$folder/include/crt/host_defines.h" ]; then
            echo "$folder"
            return
        fi
    done
    die "Transformer Engine is compiled and needs nvcc; install the CUDA toolkit, use the Dockerfile or EVO2_BUILD=cpu"
}

make_venv() { # python, options of venv
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv "${@:2}" .venv
        PIP=(.venv/bin/python -m pip)
    else # Debian splits it off; a recent pip outside can fill the environment instead
        "$1" -m venv --without-pip "${@:2}" .venv
        PIP=("$1" -m pip --python .venv/bin/python)
        "${PIP[@]}" --version >/dev/null 2>&1 || die "$1 can make no environment; install python3-venv, or set PYTHON"
    fi
}

install() {
    # compiled once: where PYTHONDONTWRITEBYTECODE is set, as in most images, every start would compile Megatron again,
    # two thirds of the time of its import
    .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint "$CONSTRAINTS" \
        "${LINKS[@]}" "$@"
}

install_cpu() {
    local backend=()
    if [ ${#LINKS[@]} -gt 0 ] && install --no-index --no-deps torch 2>/dev/null; then
        echo "torch: taken from $PIP_FIND_LINKS"
    else
        backend=(--torch-backend cpu) # PyTorch's CPU builds; the usual index has only CUDA's, 2.5 GB larger
    fi
    install "${backend[@]}" --editable '.[dev]'
}

install_cuda() { # 12 or 13
    local backend=() site headers
    # the usual index has the build for CUDA 13
    [ "$1" = 13 ] || backend=(--torch-backend auto)
    install "${backend[@]}" --editable '.[dev]'
    .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        die "torch came out as a CPU build; leave PIP_FIND_LINKS out, or build with EVO2_BUILD=cpu"
    # compile Transformer Engine against the headers of the CUDA libraries that torch brought
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    headers=$(printf '%s\n' "$site"/nvidia/*/include | paste -sd :)
    # its PyTorch part asks for the CUDA 12 core whatever torch it is built for; both together overwrite each other
    CPATH=$headers${CPATH:+:$CPATH} NVTE_FRAMEWORK=pytorch install "${backend[@]}" \
        --excludes <(echo "transformer-engine-cu$((25 - $1))") --editable ".[dev,cuda$1]"
}

install_image() {
    # seen through --system-site-packages, which uv does not look at
    install --excludes <(printf '%s\n' torch triton transformer-engine) --editable '.[dev,cuda13]'
    # the image's own torchrun starts the image's Python, which does not see this environment
    printf '#!%s\nimport sys\nfrom torch.distributed.run import main\nsys.exit(main())\n' "$PWD/.venv/bin/python" \
        >.venv/bin/torchrun
    chmod +x .venv/bin/torchrun
}

# what decides the result, without comments: a changed pin, or a folder moved (its scripts hold its path), rebuilds
HASH=$(sed -e '/^# --- /,$d' pyproject.toml | cat - constraints.txt requirements-no-deps.txt .ci_build.sh <(pwd -P) |
    sed -e 's/ *#.*//' -e '/^$/d' | sha256sum | cut -d ' ' -f 1)
if [ -e .venv ]; then
    [ -e $MARK ] || [ ! -e .venv/pyvenv.cfg ] || die ".venv was not made by this script; remove it first"
    kind='' hash=''
    [ ! -e $MARK ] || read -r kind hash <$MARK
    if [ "$hash" = "$HASH" ] && [[ "${EVO2_BUILD:-$kind}" == "$kind" ]]; then
        [ "$kind" != cpu ] || [ -n "${EVO2_BUILD:-}" ] || ! has_gpu ||
            echo ".ci_build.sh: .venv is for cpu and this machine has a GPU; remove .venv to build for it" >&2
        exit 0
    fi
fi

KIND=$(choose_kind)
PYTHON=$(choose_python)
case $KIND in
cpu | image) ;;
cuda12 | cuda13)
    CUDA_HOME=$(choose_toolkit)
    export CUDA_HOME
    ;;
*) die "EVO2_BUILD is '$KIND'; choose cpu, cuda12, cuda13 or image" ;;
esac

echo "Building .venv for $KIND with $("$PYTHON" -V)"
# moved first: what an interrupted removal leaves must not look like an environment that somebody else made
rm -rf .venv.old
[ ! -e .venv ] || mv .venv .venv.old
mkdir .venv
echo building >$MARK
rm -rf .venv.old

# uv reads none of pip's settings
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
LINKS=()
for folder in ${PIP_FIND_LINKS:-}; do LINKS+=(--find-links "$folder"); done
CONSTRAINTS=constraints.txt
if [ "$KIND" = cuda12 ]; then # the pins of the CUDA libraries are CUDA 13's; torch's CUDA 12 build pins its own
    CONSTRAINTS=.venv/constraints.txt
    grep -Ev '^(cuda-|nvidia-(cu|nccl|nv))' constraints.txt >$CONSTRAINTS
fi

if [ "$KIND" = image ]; then make_venv "$PYTHON" --system-site-packages; else make_venv "$PYTHON"; fi
env -u PIP_CONSTRAINT "${PIP[@]}" --disable-pip-version-check install --quiet "$UV"
case $KIND in
cpu) install_cpu ;;
cuda12 | cuda13) install_cuda "${KIND#cuda}" ;;
image) install_image ;;
esac
install --no-deps --requirement requirements-no-deps.txt
TORCH=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
echo "$KIND $HASH" >$MARK
echo "Built .venv in $SECONDS s: torch $TORCH. To use it: source .ci_test_env.sh"
