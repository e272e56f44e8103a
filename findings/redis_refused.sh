#!/usr/bin/env bash
# redis-py: a call to a server that is down does not fail at once, though nothing listens on the port.
#
# Expected: with defaults, a refused connection, which the kernel reports within a millisecond, is an
# error within a few milliseconds.
# Observed: the call sleeps and tries again, with growing random pauses, and fails after seconds. A cache
# that is down so costs each request seconds.
#
# Here: kvfetcher/storage/redis.py sets the retries itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install redis==8.1.0
"$folder/venv/bin/python" <<'PY'
import socket, statistics, sys, time
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

with socket.socket() as probe:  # a port on which nobody listens
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

def seconds(**options):
    start = time.monotonic()
    try:
        redis.Redis(port=port, **options).get("key")
    except redis.ConnectionError:
        return time.monotonic() - start
    sys.exit("it did not fail")

default = statistics.median(seconds() for _ in range(5))
none = statistics.median(seconds(retry=Retry(NoBackoff(), 0)) for _ in range(5))
print(f"get() from a refused port fails after {default:.2f} s by default, {none:.4f} s without retries")
sys.exit(not (default > 0.5 and none < 0.1))
PY
echo "as described"
