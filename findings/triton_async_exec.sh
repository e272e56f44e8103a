#!/usr/bin/env bash
# Triton: `await request.async_exec()` holds a thread of asyncio's default executor while it waits.
#
# Expected: 24 awaited calls to another model run side by side, as 24 awaited sleeps would.
# Observed: as many at a time as that executor has threads, min(32, cores + 4): 6 on two cores. The
# others have not even been sent. An event loop with a larger executor runs all 24 at a time.
#
# The called model has dynamic batching and says how many requests it was given at once.
#
# Here: kvfetcher/backend/fetching.py gives the loop of kv_fetch an executor of its own.
set -euo pipefail
folder=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait; fi; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip -q install nvidia-pytriton==0.7.0 'tritonclient[http]==2.73.0' numpy==1.26.4

mkdir -p "$folder"/models/{called,caller}/1
for model in called caller; do
  cat > "$folder/models/$model/config.pbtxt" <<'TXT'
backend: "python"
max_batch_size: 24
input [ { name: "threads" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "at_once" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
TXT
done
cat >> "$folder/models/called/config.pbtxt" <<'TXT'
dynamic_batching { preferred_batch_size: [ 24 ] max_queue_delay_microseconds: 2000000 }
TXT
cat > "$folder/models/called/1/model.py" <<'PY'
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        size = np.array([[len(requests)]], np.int32)
        return [pb.InferenceResponse([pb.Tensor("at_once", size)]) for _ in requests]
PY
cat > "$folder/models/caller/1/model.py" <<'PY'
import asyncio
from concurrent.futures import ThreadPoolExecutor
import triton_python_backend_utils as pb

class TritonPythonModel:
    async def execute(self, requests):
        answers = []
        for request in requests:
            threads = pb.get_input_tensor_by_name(request, "threads")
            if count := int(threads.as_numpy()[0, 0]):
                asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count))
            called = await asyncio.gather(*(
                pb.InferenceRequest(
                    model_name="called", requested_output_names=["at_once"], inputs=[threads]
                ).async_exec()
                for _ in range(24)
            ))
            sizes = [pb.get_output_tensor_by_name(c, "at_once").as_numpy() for c in called]
            largest = max(sizes, key=lambda size: size[0, 0])
            answers.append(pb.InferenceResponse([pb.Tensor("at_once", largest)]))
        return answers
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
import os, sys, time
import numpy as np
import tritonclient.http as http

client = http.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}", network_timeout=60)
for _ in range(120):
    try:
        if client.is_model_ready("caller"):
            break
    except OSError:
        pass
    time.sleep(0.5)

def at_once(threads):
    given = http.InferInput("threads", [1, 1], "INT32")
    given.set_data_from_numpy(np.array([[threads]], np.int32))
    return int(client.infer("caller", [given]).as_numpy("at_once")[0, 0])

threads = min(32, len(os.sched_getaffinity(0)) + 4)
default, larger = at_once(0), at_once(24)
print(f"default executor ({threads} threads here): {default} of 24 calls ran at a time")
print(f"executor of 24 threads:                 {larger} of 24 calls ran at a time")
sys.exit(not (default == min(threads, 24) < 24 == larger or threads >= 24))
PY
echo "as described"
