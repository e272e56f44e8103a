"""bench_front: units from files through the models that kv_fetch calls, as fast as they take them.

Inputs   plan    STRING [1]  JSON: units (paths), targets (BlockTargets), in_flight, and either
                 seconds (go round until then; what is done in the first `lead_seconds` or later
                 counts for nothing) or once (each pair of unit and target one time)
Outputs  result  STRING [1]  JSON: done (count per unit), seconds (in which), latency_ms, units (stamps, batch), how
"""

import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend.fetching import unit_request
from kvfetcher.backend.tensors import read_text, text_tensor


class TritonPythonModel:
    def initialize(self, args):
        self.units = {}

    async def execute(self, requests):
        return [await self._run(request) for request in requests]

    async def _run(self, request):
        plan = json.loads(read_text(request, "plan", pb_utils))
        for path in plan["units"]:
            if path not in self.units:
                self.units[path] = Path(path).read_bytes()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(plan["in_flight"]))
        jobs = self._jobs(plan)
        state = {"done": Counter(), "ms": [], "how": Counter(), "errors": []}
        state["units"] = []
        start = time.perf_counter()
        # While the path fills and empties it does not go at its rate.
        counts = 0.0, float("inf")
        if not plan.get("once"):
            counts = start + plan["lead_seconds"], start + plan["seconds"]
        await asyncio.gather(
            *(self._worker(plan, jobs, state, counts) for _ in range(plan["in_flight"]))
        )
        whole = time.perf_counter() - start
        result = {
            "done": dict(state["done"]),
            "seconds": whole if plan.get("once") else plan["seconds"] - plan["lead_seconds"],
            "latency_ms": sorted(state["ms"]),
            "units": state["units"],
            "how": dict(state["how"]),
            "errors": state["errors"][:3],
        }
        return pb_utils.InferenceResponse([text_tensor("result", json.dumps(result), pb_utils)])

    def _jobs(self, plan):
        units, targets = plan["units"], plan["targets"]
        if plan.get("once"):
            yield from ((unit, target) for target in targets for unit in units)
            return
        end, index = time.perf_counter() + plan["seconds"], plan.get("first", 0)
        while time.perf_counter() < end:
            yield units[index % len(units)], targets[index // len(units) % len(targets)]
            index += 1

    async def _worker(self, plan, jobs, state, counts):
        for unit, target in jobs:
            begun = time.perf_counter()
            model, inputs = unit_request(self.units[unit], target, pb_utils)
            response = await pb_utils.InferenceRequest(
                model_name=model, requested_output_names=[wire.KV_STATUS], inputs=inputs
            ).async_exec()
            if response.has_error():
                state["errors"].append(response.error().message())
                continue
            status = pb_utils.get_output_tensor_by_name(response, wire.KV_STATUS).as_numpy()
            facts = json.loads(status.reshape(-1)[0])
            state["units"].append({"stamps": facts["stamps"], "batch": facts["batch"]})
            where = facts.get("planes", "host")
            state["how"][
                f"{facts['decoder']}, planes {where}, restored by {facts['restorer']}"
            ] += 1
            now = time.perf_counter()
            if counts[0] <= now <= counts[1]:
                state["done"][unit] += 1
            state["ms"].append(round(1e3 * (now - begun), 3))
