#!/usr/bin/env bash
# Sends a command of this project to the cluster behind RAY_ADDRESS, and shows its lines:
#   cluster/submit.sh python -m pipeline.train adv_moe_cifar10_small workers=4 storage=/shared/runs
#   cluster/submit.sh --no-wait id=grid-1 -- python -m pipeline.grid storage=/shared/runs
set -euo pipefail
cd "$(dirname "$0")/.."
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
python="${PYTHON:-python}"
[[ -x .venv/bin/python && -z "${PYTHON:-}" ]] && python=.venv/bin/python
case "${1:-}" in
  -* | id=*) exec "$python" -m pipeline.submit "$@" ;;
  *) exec "$python" -m pipeline.submit -- "$@" ;;
esac
