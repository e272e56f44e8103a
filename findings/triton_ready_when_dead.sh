#!/usr/bin/env bash
# Triton: a Python model whose process was killed stays "ready".
#
# Expected: after its process is killed, the server starts another one, or says that the model is not
# ready, so that a load balancer sends requests elsewhere.
# Observed: nothing starts another process. Requests to the model fail, and both the model's and the
# server's ready endpoints go on answering 200. Loading the model again heals it.
#
# Here: kvfetcher/launcher/supervise.py watches the processes, and loads such a model again.
set -euo pipefail
folder=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait; fi; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip -q install nvidia-pytriton==0.7.0 'tritonclient[http]==2.73.0' numpy==1.26.4

mkdir -p "$folder/models/pid/1"
cat > "$folder/models/pid/config.pbtxt" <<'TXT'
backend: "python"
max_batch_size: 0
output [ { name: "pid" data_type: TYPE_INT32 dims: [ 1 ] } ]
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
TXT
cat > "$folder/models/pid/1/model.py" <<'PY'
import os
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        pid = np.array([os.getpid()], np.int32)
        return [pb.InferenceResponse([pb.Tensor("pid", pid)]) for _ in requests]
PY

# The wheel's server looks for a stub of this Python beside its backend, and for libpython.
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$site/pytriton/tritonserver/backends" "$folder/backends"
version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cp "$site/pytriton/tritonserver/python_backend_stubs/$version/"* "$folder/backends/python/"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
LD_LIBRARY_PATH="$site/nvidia_pytriton.libs:$(python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')" \
  "$site/pytriton/tritonserver/bin/tritonserver" --model-repository "$folder/models" \
  --backend-directory "$folder/backends" --http-address 127.0.0.1 --http-port "$port" \
  --allow-grpc false --allow-metrics false > "$folder/log" 2>&1 &
server=$!

python - "$port" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import os, signal, sys, time
import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

client = http.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}", network_timeout=60)
for _ in range(120):
    try:
        if client.is_model_ready("pid"):
            break
    except OSError:
        pass
    time.sleep(0.5)

def ask():
    given = http.InferInput("x", [1], "INT32")
    given.set_data_from_numpy(np.zeros(1, np.int32))
    return int(client.infer("pid", [given]).as_numpy("pid")[0])

def failures(count):
    failed = 0
    for _ in range(count):
        try:
            ask()
        except InferenceServerException as exc:
            print("  a request fails:", str(exc)[:70])
            failed += 1
        time.sleep(2)
    return failed

print("a request is answered by process", pid := ask())
os.kill(pid, signal.SIGKILL)
failed = failures(3)
ready = client.is_model_ready("pid"), client.is_server_ready()
print(f"{failed} of 3 requests failed within 6 s of the kill; model ready: {ready[0]}, server ready: {ready[1]}")
sys.exit(not (failed == 3 and all(ready)))
PY
echo "as described"
