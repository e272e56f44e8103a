"""A rank above 0 in a process of its own: `python -m tensorrt_llm._worker JSON`. It ends by being killed."""

import importlib
import json
import sys

import torch

from support.trtllm_contract.ranks import ProcessRanks
from tensorrt_llm import _utils, as_arguments, make_executor


def main(settings):
    torch.set_num_threads(1)
    rank, size = _utils.place = settings["place"]
    args = as_arguments(**settings["arguments"])
    ranks = ProcessRanks(settings["meeting"], rank, size)
    connector = args.kv_connector_config
    module = importlib.import_module(connector["connector_module"])
    worker = getattr(module, connector["connector_worker_class"])(args)
    executor = make_executor(args, ranks, scheduler=None, worker=worker, sink=None)
    with torch.inference_mode():
        while True:
            executor.step()  # begins with what rank 0 broadcasts


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
