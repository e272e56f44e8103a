"""The processes of one engine: as threads in lock step, or as real processes over torch's gloo."""

import datetime
import pickle
import threading

import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 30


class Exchange:
    """What threads that play ranks meet at."""

    def __init__(self, size):
        self.size = size
        self.slots = [None] * size
        self.barrier = threading.Barrier(size, timeout=COLLECTIVE_SECONDS)

    def swap(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        result = list(self.slots)
        self.barrier.wait()
        return result


class ThreadRanks:
    """One thread's place in an `Exchange`; what is broadcast travels pickled."""

    def __init__(self, exchange, rank):
        self.exchange, self.rank, self.size = exchange, rank, exchange.size

    def broadcast(self, value):
        return pickle.loads(self.exchange.swap(self.rank, pickle.dumps(value))[0])

    def allgather(self, value):
        return self.exchange.swap(self.rank, value)

    def all_reduce(self, tensor):
        return torch.stack(self.exchange.swap(self.rank, tensor)).sum(0)


class ProcessRanks:
    """One process of a gloo group."""

    def __init__(self, meeting_file, rank, size):
        self.rank, self.size = rank, size
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting_file}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )

    def broadcast(self, value):
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def allgather(self, value):
        boxes = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def all_reduce(self, tensor):
        # Summed in the order of `ThreadRanks`: the bits are then those of its reference.
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts).sum(0)

    def close(self):
        dist.destroy_process_group()
