"""One rank as a process of its own, forked from one that has imported what takes seconds.

Rank 0 receives dicts, {"submit": [(id, prompt, max_tokens), ...], "cancel": [id, ...]}, steps all
ranks once, and answers with what it has: {"tokens": {...}, "ends": {...}, "idle": bool}.
The end of its pipe ends all ranks.
"""

import multiprocessing
from pathlib import Path

import torch

from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.engines.paged import contract
from kvfetcher.engines.paged.executor import NewRequest, Rules
from kvfetcher.engines.paged.model import PagedModel
from support.trtllm_contract.engine import BLOCK, PART, llm_args
from support.trtllm_contract.loop import ContractLoop, GreedySink
from support.trtllm_contract.ranks import ProcessRanks

# What imports nearly all that a rank needs.
_PRELOADED = ["kvfetcher.engines.paged.model", "transformers.models.llama.modeling_llama"]


def start_rank(settings, pipe=None):
    """Start `main` in a process of its own; the caller may close its own copy of `pipe`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=main, args=(settings, pipe), daemon=True)
    process.start()
    return process


def main(settings, pipe):
    torch.set_num_threads(1)
    ranks = ProcessRanks(settings["meeting"], settings["rank"], settings["num_ranks"])
    leads = ranks.rank == 0
    classes = trtllm_connector.bind(
        contract,
        place=lambda: trtllm_connector.RankPlace(ranks.rank, ranks.size),
        socket_path=Path(settings["socket"]),
    )
    worker = classes.worker(llm_args())
    sink = GreedySink() if leads else None
    loaded = load_model(Path(settings["model"]), device="cpu", kv_dtype="bfloat16")
    loop = ContractLoop(
        PagedModel(
            loaded,
            ranks=ranks,
            num_blocks=64,
            tokens_per_block=BLOCK,
            layout=settings["layout"],
        ),
        ranks=ranks,
        scheduler=classes.scheduler(llm_args()) if leads else None,
        worker=worker,
        rules=Rules(part_tokens=PART, max_batch=4, tokens_per_block=BLOCK, reuse=False),
        sink=sink,
    )
    with torch.inference_mode():
        while (command := ranks.broadcast(next_command(pipe) if leads else None)) is not None:
            if leads:
                for request_id, prompt, max_tokens in command["submit"]:
                    loop.submit(NewRequest(request_id, tuple(prompt), max_tokens, ""))
                for request_id in command["cancel"]:
                    loop.cancel(request_id)
            loop.step()
            if leads:
                pipe.send({"tokens": sink.tokens, "ends": sink.ends, "idle": loop.is_idle})
    worker.close()
    ranks.close()


def next_command(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None
