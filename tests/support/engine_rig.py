"""A tiny random Llama on disk, and an engine over it with short ways to use it."""

import asyncio
import json

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfetcher.config import CodecConfig, Config, EngineConfig, FetchConfig, SaveConfig
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.engines.hf.engine import TorchEngine
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.leases import LeaseTable, tokens_digest

EOS = 256
SLICE, CHUNK, BLOCK = 16, 32, 8


def byte_tokenizer():
    """One token per byte, so that a character of several bytes is several tokens; 256 is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_model(folder, **overrides):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "initializer_range": 0.3,  # decided logits: greedy choices do not hang on rounding
    }
    LlamaForCausalLM(LlamaConfig(**settings | overrides)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Rig:
    """An engine with its arena and leases, and short ways to use them."""

    def __init__(self, loaded, folder, *, num_bytes=1 << 20, ttl=120.0, save=None, **engine):
        settings = {
            "prefill_slice_tokens": SLICE,
            "tokens_per_block": BLOCK,
            "num_threads": 1,
        } | engine
        config = Config(
            engine=EngineConfig(**settings),
            codec=CodecConfig(chunk_tokens=CHUNK),
            fetch=FetchConfig(lease_ttl_seconds=ttl),
            save=SaveConfig(**(save or {})),
        )
        self.now = 0.0
        self.arena = Arena.create(
            folder / "arena", spec=loaded.spec, tokens_per_block=BLOCK, num_bytes=num_bytes
        )
        self.leases = LeaseTable(num_blocks=self.arena.num_blocks, tokens_per_block=BLOCK)
        self.engine = TorchEngine(
            loaded, config, arena=self.arena, leases=self.leases, clock=lambda: self.now
        )

    def request(self, ids, *, max_tokens=8, lease=None, save=False, **sampling):
        return GenerateRequest(
            tuple(ids), SamplingParams(max_tokens=max_tokens, **sampling), lease=lease, save=save
        )

    async def run(self, ids, *, is_cancelled=None, **options):
        """All of a request's output at once."""
        request = self.request(ids, **options)
        return await collect(self.engine.generate(request, is_cancelled=is_cancelled))

    def close(self):
        self.engine.close()
        self.arena.close()


class Output:
    def __init__(self, events):
        self.events = events
        self.ids = [i for event in events for i in event.new_token_ids]
        self.text = "".join(event.text_delta for event in events)
        self.reasons = [event.finish_reason for event in events if event.finish_reason]
        self.timings = [event.timings for event in events if event.timings]
        self.tickets = [event.save for event in events if event.save]

    @property
    def reason(self):
        assert len(self.reasons) == 1, self.reasons
        return self.reasons[0]

    @property
    def ticket(self):
        assert len(self.tickets) == 1
        assert self.events[-1].save is self.tickets[0]
        return self.tickets[0]


async def collect(stream):
    return Output([event async for event in stream])


def saved_values(rig, ticket):
    return np.concatenate([rig.arena.read(target) for target in ticket.targets], axis=3)


def lease_with(rig, ids, values):
    """Do what a fetch does: lease, write, seal."""
    lease = rig.leases.lease(len(ids), 60.0, now=rig.now)
    target = rig.arena.target(lease.block_ids, len(ids))
    rig.arena.write(target, 0, np.ascontiguousarray(values))
    rig.leases.seal(lease.id, len(ids), tokens_digest(ids), now=rig.now)
    return lease.id


def some_ids(number, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number,), generator=generator).tolist()


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
