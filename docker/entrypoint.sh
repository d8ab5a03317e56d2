#!/usr/bin/env bash
# head [flags of `ray start`] | worker [flags] | any command. A node does not start without a token: its ports are reached from
# other containers, and whoever reaches them could run code.
#
#   RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH   the token, or a file of mode 600 or 400 that holds it
#   HAMU_HEAD                               host:port of the head that a worker joins (default: head:6379)
#   HAMU_CPUS                               cores that the node offers (default: all that it sees)
#   HAMU_GRACE_S                            seconds that SIGTERM leaves to the trials (default: 25); the container's own grace is longer
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

role="${1:-head}"
if [[ "$role" != head && "$role" != worker ]]; then
    exec "$@"
fi
shift || true

[[ "${RAY_AUTH_MODE:-}" == token ]] ||
    refuse "RAY_AUTH_MODE is '${RAY_AUTH_MODE:-}', a node of a cluster needs 'token'; set it, and give a token"
if [[ -z "${RAY_AUTH_TOKEN:-}" ]]; then
    file="${RAY_AUTH_TOKEN_PATH:-}"
    [[ -n "$file" ]] || refuse "a node needs a token; set RAY_AUTH_TOKEN_PATH to a file that holds one"
    [[ -r "$file" ]] || refuse "$file, where the token should be, cannot be read by user $(id -u); see docker/README.md"
    [[ -n "$(tr -d '[:space:]' <"$file")" ]] || refuse "$file is empty; put a token into it: openssl rand -hex 32 > FILE"
    mode="$(stat --dereference --format=%a "$file")"
    [[ "$mode" == 600 || "$mode" == 400 ]] || refuse "$file has mode $mode, so others can read the token; run: chmod 600 FILE"
fi

common=(--block --disable-usage-stats --dashboard-agent-listen-port=52365)
if [[ -n "${HAMU_CPUS:-}" ]]; then
    common+=("--num-cpus=$HAMU_CPUS")
fi
# SIGTERM reaches `ray start --block`, which marks the node as one that is to be taken away and waits: its trials save, leave it and
# go on elsewhere. It ends when the node is idle, or when the seconds are over.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${HAMU_GRACE_S:-25}"
if [[ "$role" == head ]]; then
    # All addresses of the container; compose.yaml publishes the dashboard on the host's loopback alone.
    exec ray start --head --port=6379 --dashboard-host=0.0.0.0 --dashboard-port=8265 "${common[@]}" "$@"
fi
exec ray start --address="${HAMU_HEAD:-head:6379}" "${common[@]}" "$@"
