# SPDX-License-Identifier: Apache-2.0
# Activate the environment that .ci_build.sh built: `source .ci_test_env.sh`, from bash or zsh, from any folder.
if [ -n "${ZSH_VERSION:-}" ]; then
    _evo2_root=$(eval 'cd "$(dirname "${(%):-%x}")" && pwd') # eval: bash cannot read this expression
else
    _evo2_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fi
if [ ! -e "$_evo2_root/.venv/evo2-build" ] || grep -q '^building' "$_evo2_root/.venv/evo2-build"; then
    echo ".ci_test_env.sh: error: $_evo2_root/.venv is not built; run $_evo2_root/.ci_build.sh first" >&2
    unset _evo2_root
    return 1 2>/dev/null || exit 1
fi
. "$_evo2_root/.venv/bin/activate"
unset _evo2_root
