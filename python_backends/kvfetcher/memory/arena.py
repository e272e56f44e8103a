"""The KV arena: blocks of KV values in a shared-memory file, read and written by several processes.

The engine process creates the file (normally in /dev/shm) and owns it; the processes that restore
and encode KV attach to it. Who may touch which block is decided by leases (`kvfetcher.memory.leases`);
this module moves values and checks geometry only. Nothing here is locked: two processes that write
one block at a time are a broken lease rule, not a case that the arena sorts out.

File, little-endian: bytes 0-7 magic ``KVFARENA``, 8-11 version (uint32), 12-15 length of the JSON
text (uint32), the JSON text, zeros up to byte 4096, then the blocks as one C-ordered array
``[num_blocks, L, K, H, tokens_per_block, D]`` of the KV dtype's bit patterns. Where the JSON has
``gpu``, the file ends there and the blocks lie in that GPU's memory (`kvfetcher.memory.gpu_arena`).
``heads`` says which of the model's KV heads the blocks hold: all, or one part's of an arena in
several (`kvfetcher.memory.split_arena`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import mmap
import os
import secrets
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import ArenaError, ConfigError, LayoutError
from kvfetcher.spec import HeadRange, KVSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARENA_VERSION = 2
HEADER_BYTES = 4096
MAX_BLOCKS = 1 << 24

_TARGET_KEYS = frozenset({"arena", "block_ids", "num_tokens", "lease_id", "tenant", "expires_at"})
# A million tokens in blocks of 16.
_MAX_TARGET_CHARACTERS = 1 << 20
# What is kept of parsed targets is bounded in bytes: number by size. A chunk's has some hundred.
_KEPT_TARGETS = 128
_KEPT_CHARACTERS = 16 << 10
_MAGIC = b"KVFARENA"
_PREFIX = struct.Struct("<8sII")


def storage_dtype(spec: KVSpec) -> np.dtype[Any]:
    """The numpy type that holds bit patterns of `spec.dtype`: uint16 or uint8."""
    return np.dtype("<u2") if spec.item_bytes == 2 else np.dtype("u1")


@dataclass(frozen=True, slots=True)
class BlockTarget:
    """Where `num_tokens` tokens lie: in `block_ids`, in order, the last block perhaps partly filled.

    ``generation`` is the arena's id, made at random by each engine start: every process finds the
    arena's files by it in the run folder (`split_arena.find_arena`). A request so never names a file,
    and a target kept over an engine's restart is refused instead of read. Between models a target
    travels sealed (`permits`).
    """

    generation: str
    block_ids: tuple[int, ...]
    num_tokens: int
    lease_id: str = ""
    """Of the lease that the blocks belong to; "" = of none."""
    tenant: str = ""
    """Whose KV lies there (`permits.Permits.tenant`); "" = not known."""
    expires_at: float = 0.0
    """When the lease ends unless it is renewed, seconds of the monotonic clock; 0 = not known."""

    def __post_init__(self) -> None:
        ids = self.block_ids
        if not isinstance(ids, tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise LayoutError(f"BlockTarget.block_ids must be a tuple of ints >= 0, got {ids!r}")
        if len(set(ids)) != len(ids):
            raise LayoutError(f"BlockTarget.block_ids names a block twice: {ids!r}")
        if type(self.num_tokens) is not int or self.num_tokens < 1 or not ids:
            raise LayoutError(
                f"BlockTarget needs at least one token and one block, got {self.num_tokens!r}"
                f" tokens in {len(ids)} blocks"
            )
        if not all(isinstance(t, str) for t in (self.generation, self.lease_id, self.tenant)):
            raise LayoutError("BlockTarget.generation, lease_id and tenant must be strings")
        if type(self.expires_at) is not float:
            raise LayoutError(f"BlockTarget.expires_at must be a float, got {self.expires_at!r}")

    def span(self, first_token: int, num_tokens: int, *, tokens_per_block: int) -> BlockTarget:
        """The part that holds tokens [first_token, first_token + num_tokens).

        Raises:
            LayoutError: `first_token` is not the first of a block, or the part ends past the end.
        """
        if first_token % tokens_per_block or first_token < 0:
            raise LayoutError(
                f"token {first_token} does not begin a block of {tokens_per_block} tokens"
            )
        if num_tokens < 1 or first_token + num_tokens > self.num_tokens:
            raise LayoutError(
                f"tokens [{first_token}, {first_token + num_tokens}) are not within the"
                f" {self.num_tokens} tokens of the target"
            )
        first = first_token // tokens_per_block
        last = -(-(first_token + num_tokens) // tokens_per_block)
        return replace(self, block_ids=self.block_ids[first:last], num_tokens=num_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `arena` is the generation."""
        return {
            "arena": self.generation,
            "block_ids": list(self.block_ids),
            "num_tokens": self.num_tokens,
            "lease_id": self.lease_id,
            "tenant": self.tenant,
            "expires_at": self.expires_at,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Any) -> BlockTarget:
        """Parse; LayoutError where keys are missing, unknown, or of the wrong type."""
        if not isinstance(data, dict) or set(data) != _TARGET_KEYS:
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise LayoutError(f"a block target has the keys {sorted(_TARGET_KEYS)}, got {got}")
        ids = data["block_ids"]
        return cls(
            generation=data["arena"],
            block_ids=tuple(ids) if isinstance(ids, list) else ids,
            num_tokens=data["num_tokens"],
            lease_id=data["lease_id"],
            tenant=data["tenant"],
            expires_at=data["expires_at"],
        )

    @classmethod
    def from_json(cls, text: str) -> BlockTarget:
        """Parse; LayoutError where the text is not a block target, or longer than one may be."""
        if len(text) > _MAX_TARGET_CHARACTERS:
            raise LayoutError(
                f"a block target has at most {_MAX_TARGET_CHARACTERS} characters, got {len(text)}"
            )
        return _known_target(text) if len(text) <= _KEPT_CHARACTERS else _parse_target(text)


def _parse_target(text: str) -> BlockTarget:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise LayoutError(f"a block target must be JSON, got {text[:80]!r}") from exc
    return BlockTarget.from_dict(data)


_known_target = functools.lru_cache(maxsize=_KEPT_TARGETS)(_parse_target)
"""Kept, for all units of a chunk have the same target; about 16 MB at most."""


@dataclass(frozen=True, slots=True)
class ArenaHeader:
    """What the file says of an arena, whoever holds its blocks."""

    spec: KVSpec
    """Geometry of the whole model."""
    heads: HeadRange
    """That the blocks hold."""
    tokens_per_block: int
    num_blocks: int
    generation: str
    gpu: GpuMemory | None = None

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """[num_blocks, L, K, H, tokens_per_block, D]."""
        spec, heads = self.spec, self.heads.count
        lead = (self.num_blocks, spec.num_layers, spec.kv_factor)
        return (*lead, heads, self.tokens_per_block, spec.head_dim)

    @property
    def blocks_bytes(self) -> int:
        return math.prod(self.blocks_shape) * self.spec.item_bytes

    def check_generation(self, path: Path, wanted: str) -> None:
        """Raise ArenaError unless the arena of file `path` is of generation `wanted`."""
        if self.generation != wanted:
            raise ArenaError(
                f"arena {path} is of generation {self.generation}, wanted {wanted}; the engine was"
                " restarted, ask it for a new lease"
            )


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Where an arena's blocks lie on a GPU."""

    index: int
    """Number of the GPU, as CUDA counts."""
    handle: str
    """CUDA IPC handle of the memory, hex."""
    owner: int
    """Process that allocated it."""


class Arena:
    """A mapped arena. Make one with `create` (the owner) or `attach` (everybody else).

    Not thread-safe as to `close`; `read` and `write` of different blocks may run in parallel.
    Arrays returned by `read` are copies; `blocks` is the mapping itself and must not be kept after
    `close`.
    """

    def __init__(
        self, path: Path, header: ArenaHeader, memory: mmap.mmap, *, lock_fd: int | None = None
    ) -> None:
        self.path = path
        self.header = header
        self._lock_fd = lock_fd
        self._memory = memory
        shape = header.blocks_shape
        self._blocks: Any = np.frombuffer(
            memory, storage_dtype(header.spec), count=math.prod(shape), offset=HEADER_BYTES
        ).reshape(shape)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, num_blocks={self.num_blocks},"
            f" spec={self.spec})"
        )

    @property
    def spec(self) -> KVSpec:
        """Geometry of the whole model; `heads` says which part of it lies here."""
        return self.header.spec

    @property
    def heads(self) -> HeadRange:
        return self.header.heads

    @property
    def parts(self) -> tuple[Arena, ...]:
        """What lies in one piece each, by its heads: this arena itself unless it is split."""
        return (self,)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parts' files."""
        return tuple(str(part.path) for part in self.parts)

    @property
    def tokens_per_block(self) -> int:
        return self.header.tokens_per_block

    @property
    def num_blocks(self) -> int:
        return self.header.num_blocks

    @property
    def generation(self) -> str:
        return self.header.generation

    @property
    def gpu(self) -> int | None:
        """Index of the GPU that the (first part's) blocks lie on; None = host memory."""
        return None if self.header.gpu is None else self.header.gpu.index

    @classmethod
    def create(
        cls, path: str | Path, *, spec: KVSpec, tokens_per_block: int, num_bytes: int
    ) -> Arena:
        """Make the file with as many blocks as `num_bytes` holds, and map it.

        All memory is reserved at once, so that a full /dev/shm is an error here and not a SIGBUS
        at the first write. A file of that path is replaced; a process that has the old one mapped keeps it.

        Raises:
            ConfigError: `num_bytes` holds no block, or more than MAX_BLOCKS.
            ArenaError: the file cannot be made, or the file system lacks the space.
        """
        header = plan_arena(spec, tokens_per_block=tokens_per_block, num_bytes=num_bytes)
        return cls.create_from(header, path)

    @classmethod
    def create_from(cls, header: ArenaHeader, path: str | Path) -> Arena:
        """`create` as `plan_arena` says, perhaps with some of the heads only.

        Raises:
            ArenaError: as `create`.
        """
        total = HEADER_BYTES + header.blocks_bytes
        fd = write_arena_file(Path(path), header, num_bytes=total)
        try:
            memory = mmap.mmap(fd, total)
        except OSError as exc:
            os.close(fd)
            Path(path).unlink(missing_ok=True)
            raise ArenaError(f"arena {path} cannot be mapped: {exc.strerror}") from exc
        return cls(Path(path), header, memory, lock_fd=fd)

    @staticmethod
    def sweep(folder: Path, pattern: str) -> int:
        """Remove arena files in `folder` whose owner died without `unlink`.

        Only files of this user whose names match the glob `pattern`, and parts (`split_arena`) of
        such a name. An owner holds a lock on its file,
        which the kernel drops with the process, so the living are left alone, those in other
        containers that share the folder too.

        Returns:
            How many were removed.
        """
        removed = 0
        patterns = (pattern, f"{pattern}.[0-9]*", f".{pattern}.*.partial")
        for path in [found for name in patterns for found in folder.glob(name)]:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:  # somebody else's, or just gone
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed += 1
            except BlockingIOError:
                continue
            finally:
                os.close(fd)
        return removed

    @classmethod
    def attach(cls, path: str | Path, *, generation: str | None = None) -> Arena:
        """Map an arena in host memory that another process created.

        Args:
            path: the file.
            generation: when given, the arena must be that one.

        Raises:
            ArenaError: no such file, not an arena, cut short, on a GPU, or of another generation.
        """
        path = Path(path)
        fd, header = _open_arena_file(path)
        try:
            if generation is not None:
                header.check_generation(path, generation)
            if header.gpu is not None:
                raise ArenaError(f"arena {path} is on a GPU; use split_arena.attach_part")
            memory = mmap.mmap(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        return cls(path, header, memory)

    @property
    def blocks(self) -> Any:
        """[num_blocks, L, K, H, tokens_per_block, D], the shared memory itself.

        A numpy array; of a `GpuArena`, a torch tensor of as many signed bytes an item.
        """
        if self._blocks is None:
            raise ArenaError(f"arena {self.path} is closed")
        return self._blocks

    def target(self, block_ids: tuple[int, ...], num_tokens: int) -> BlockTarget:
        """A target in this arena; checked like one that came from elsewhere."""
        target = BlockTarget(self.generation, block_ids, num_tokens)
        self._check(target)
        return target

    def write(self, target: BlockTarget, layer_start: int, values: NDArray[Any]) -> None:
        """Store values of some layers of a target's tokens.

        Args:
            target: where; of this arena's generation.
            layer_start: first layer of `values`.
            values: [Lg, K, H, T, D] bit patterns, T = target.num_tokens, any strides.

        Raises:
            ArenaError: the target is of another generation.
            LayoutError: shape, dtype, layers or block ids do not fit.
        """
        layers = self.check_values(target, layer_start, values.shape)
        if values.dtype != storage_dtype(self.spec):
            raise LayoutError(f"values must be {storage_dtype(self.spec)}, got {values.dtype}")
        step = self.tokens_per_block
        blocks = self.blocks
        for index, block_id in enumerate(target.block_ids):
            part = values[:, :, :, index * step : (index + 1) * step]
            blocks[block_id, layers.start : layers.stop, :, :, : part.shape[3]] = part

    def read(
        self, target: BlockTarget, layer_start: int = 0, num_layers: int | None = None
    ) -> NDArray[Any]:
        """Copy values of some layers of a target's tokens out.

        Returns:
            [Lg, K, H, T, D] bit patterns, a new C-ordered array; T = target.num_tokens.

        Raises:
            ArenaError: the target is of another generation.
            LayoutError: layers or block ids do not fit.
        """
        layers = self._read_layers(target, layer_start, num_layers)
        spec, step = self.spec, self.tokens_per_block
        shape = (len(layers), spec.kv_factor, self.heads.count, target.num_tokens, spec.head_dim)
        values = np.empty(shape, storage_dtype(spec))
        blocks = self.blocks
        for index, block_id in enumerate(target.block_ids):
            part = values[:, :, :, index * step : (index + 1) * step]
            part[...] = blocks[block_id, layers.start : layers.stop, :, :, : part.shape[3]]
        return values

    def load(self, target: BlockTarget) -> Any:
        """Values of a target's tokens where they lie: [L, K, H, T, D], a copy.

        Here a numpy array, as from `read`; of a `GpuArena`, a torch tensor on its GPU.

        Raises:
            ArenaError, LayoutError: as `read`.
        """
        return self.read(target)

    def close(self) -> None:
        """Unmap. Safe to call twice. The file stays; the owner removes it with `unlink`."""
        self._blocks = None
        self._unlock()
        # An array that somebody kept holds the mapping; it goes when that array goes.
        with contextlib.suppress(BufferError):
            self._memory.close()

    def unlink(self) -> None:
        """Remove the file; processes that have it mapped keep their mapping. Owner only."""
        self.path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _layers(self, layer_start: int, num_layers: int) -> range:
        if layer_start < 0 or num_layers < 1 or layer_start + num_layers > self.spec.num_layers:
            raise LayoutError(
                f"layers [{layer_start}, {layer_start + num_layers}) are not within the"
                f" {self.spec.num_layers} layers of the arena"
            )
        return range(layer_start, layer_start + num_layers)

    def check_values(self, target: BlockTarget, layer_start: int, shape: tuple[int, ...]) -> range:
        """The layers that values [Lg, K, H, T, D] of a target are of.

        Raises:
            ArenaError: the target is of another generation.
            LayoutError: shape, layers or block ids do not fit.
        """
        self._check(target)
        spec = self.spec
        if len(shape) != 5:
            raise LayoutError(f"values must be [Lg, K, H, T, D], got shape {tuple(shape)}")
        layers = self._layers(layer_start, shape[0])
        expected = (
            len(layers),
            spec.kv_factor,
            self.heads.count,
            target.num_tokens,
            spec.head_dim,
        )
        if tuple(shape) != expected:
            raise LayoutError(f"values must be [Lg, K, H, T, D] = {expected}, got {tuple(shape)}")
        return layers

    def _read_layers(self, target: BlockTarget, layer_start: int, num_layers: int | None) -> range:
        self._check(target)
        if num_layers is None:
            num_layers = self.spec.num_layers - layer_start
        return self._layers(layer_start, num_layers)

    def _check(self, target: BlockTarget) -> None:
        if target.generation != self.generation:
            raise ArenaError(
                f"block target of arena generation {target.generation} used with generation"
                f" {self.generation} ({self.path}); the engine was restarted, ask for a new lease"
            )
        needed = -(-target.num_tokens // self.tokens_per_block)
        if len(target.block_ids) != needed or max(target.block_ids) >= self.num_blocks:
            raise LayoutError(
                f"{target.num_tokens} tokens take {needed} blocks of ids 0 to"
                f" {self.num_blocks - 1}, got ids {target.block_ids}"
            )


def plan_arena(spec: KVSpec, *, tokens_per_block: int, num_bytes: int) -> ArenaHeader:
    """The header of a new arena of all heads in host memory that takes at most `num_bytes`.

    Raises:
        ConfigError: `num_bytes` holds no block, or more than MAX_BLOCKS.
    """
    block_bytes = spec.bytes_per_token * tokens_per_block
    num_blocks = (num_bytes - HEADER_BYTES) // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"an arena of {num_bytes} bytes holds no block of {block_bytes} bytes"
            f" ({tokens_per_block} tokens); raise engine.arena_bytes"
        )
    if num_blocks > MAX_BLOCKS:
        raise ConfigError(
            f"an arena of {num_bytes} bytes would have {num_blocks} blocks, at most"
            f" {MAX_BLOCKS} are possible; lower engine.arena_bytes or raise"
            " engine.tokens_per_block"
        )
    heads = HeadRange(0, spec.num_kv_heads)
    return ArenaHeader(spec, heads, tokens_per_block, num_blocks, secrets.token_hex(16))


def write_arena_file(path: Path, header: ArenaHeader, *, num_bytes: int) -> int:
    """Make an arena's file, whole and reserved; it appears at `path` at once.

    Returns:
        Its file descriptor, locked. `Arena.sweep` takes a file without a lock for a dead one.

    Raises:
        ArenaError: the file cannot be made, or the file system lacks the space.
    """
    partial = path.with_name(f".{path.name}.{header.generation[:8]}.partial")
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, num_bytes)
            os.pwrite(fd, _PREFIX.pack(_MAGIC, ARENA_VERSION, len(text)) + text, 0)
            partial.replace(path)
        except OSError:
            os.close(fd)
            raise
    except OSError as exc:
        with contextlib.suppress(OSError):
            partial.unlink()
        remedy = (
            f"; it needs {num_bytes} bytes: lower engine.arena_bytes or enlarge the file system"
            " (docker: --shm-size)"
            if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
            else ""
        )
        raise ArenaError(f"arena {path} cannot be created: {exc.strerror}{remedy}") from exc
    return fd


def read_arena_header(path: str | Path) -> ArenaHeader:
    """What an arena's file says, without attaching to it.

    Raises:
        ArenaError: no such file, not an arena, or cut short.
    """
    fd, header = _open_arena_file(Path(path))
    os.close(fd)
    return header


def _open_arena_file(path: Path) -> tuple[int, ArenaHeader]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise ArenaError(
            f"arena {path} cannot be opened: {exc.strerror}; is the engine running?"
        ) from exc
    try:
        header = _parse_header(path, os.pread(fd, HEADER_BYTES, 0))
        total = HEADER_BYTES + (0 if header.gpu else header.blocks_bytes)
        size = os.fstat(fd).st_size
        if size != total:
            raise ArenaError(f"arena {path} has {size} bytes, its header says {total}")
    except ArenaError:
        os.close(fd)
        raise
    return fd, header


def _parse_header(path: Path, header: bytes) -> ArenaHeader:
    """The header's facts; ArenaError where anything is odd."""
    if len(header) < _PREFIX.size or header[:8] != _MAGIC:
        raise ArenaError(f"{path} is not a KV arena")
    _, version, length = _PREFIX.unpack_from(header)
    if version != ARENA_VERSION:
        raise ArenaError(f"arena {path} is of version {version}, this build maps {ARENA_VERSION}")
    try:
        if _PREFIX.size + length > len(header):
            raise ValueError(f"JSON text of {length} bytes")
        data = json.loads(header[_PREFIX.size : _PREFIX.size + length])
        spec, heads = KVSpec(**data["spec"]), HeadRange(**data["heads"])
        if not 0 <= heads.start < heads.stop <= spec.num_kv_heads:
            raise ValueError(f"{heads} of {spec.num_kv_heads} heads")
        tokens_per_block, num_blocks = int(data["tokens_per_block"]), int(data["num_blocks"])
        generation = str(data["generation"])
        if tokens_per_block < 1 or not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"{num_blocks} blocks of {tokens_per_block} tokens")
        gpu = data.get("gpu")
        memory = None if gpu is None else GpuMemory(**gpu)
        if memory is not None:
            bytes.fromhex(memory.handle)
    except (ValueError, KeyError, TypeError, ConfigError) as exc:
        raise ArenaError(f"arena {path} has an unreadable header: {exc}") from exc
    return ArenaHeader(spec, heads, tokens_per_block, num_blocks, generation, memory)
