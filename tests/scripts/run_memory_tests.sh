#!/usr/bin/env bash
# Profiles every configuration of tests/configs, each in a process of its own, into profiler_logs/<name>.
# What already has a result is not run again. Arguments go to `wanvram profile`: run_memory_tests.sh --device simulated --gpu rtx4060 --force
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# An activated environment wins over the .venv of `make venv`.
if [[ -n "${VIRTUAL_ENV:-}" ]] && command -v wanvram >/dev/null; then
    wanvram=wanvram
elif [[ -x .venv/bin/wanvram ]]; then
    wanvram=.venv/bin/wanvram
else
    wanvram=$(command -v wanvram) || {
        echo "run_memory_tests.sh: wanvram is not installed; run 'make venv' first" >&2
        exit 1
    }
fi
exec "$wanvram" profile tests/configs/*.yaml "$@"
