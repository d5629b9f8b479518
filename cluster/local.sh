#!/usr/bin/env bash
# A small Ray cluster on this machine, token-authenticated, to try recipes against an address:
#   cluster/local.sh 4          # a head with 4 logical CPUs; stays in the foreground, Ctrl-C ends it
#   slq train jobs/recipes/demo.yaml --set resources.address=127.0.0.1:6379
# The token lies in RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token) and is never printed; commands run by the same user
# find it there. The ports stay out of 10002-19999, which Ray gives to its workers.
set -euo pipefail
cpus=${1:-4}
port=${PORT:-6379}
bin=$(dirname "$0")/../.venv/bin
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
fi
exec "$bin/ray" start --head --block --port="$port" --num-cpus="$cpus" \
    --dashboard-host=127.0.0.1 --disable-usage-stats
