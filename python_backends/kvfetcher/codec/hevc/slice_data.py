"""The compiled entry: one picture -> the substreams of its one slice (H.265, 7.3.8.1 and 9.3)."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from kvfetcher.codec.hevc import cabac, tables
from kvfetcher.codec.hevc.coding_tree import BLOCKS, CTB, put_coding_tree
from kvfetcher.codec.hevc.pcm import fill_padding, put_pcm_ctu

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_END_OF_SLICE_SEGMENT = tables.TERMINATE << 1
_END_OF_SUBSET = tables.TERMINATE << 1 | 1
_FIRST_STATES = tables.first_states()
# A coefficient has at most a significance and a greater1 flag and 28 bypass bits in 3 tokens; a CTU
# less than 256 other tokens.
_MAX_TOKENS = 5 * 3 * CTB * CTB + 256
_MAX_CTU_WORDS = _MAX_TOKENS * 14 // 32 + 4


@functools.cache
def compiled() -> Callable[..., Any]:
    """`encode_slice_data`, compiled at its first call for each type of samples, or read from cache."""
    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    digest = hashlib.sha256(sources).hexdigest()
    try:
        return _compiled(digest, is_cached=True)
    except RuntimeError as exc:  # neither this folder nor the user's cache can be written to
        _log.warning("the HEVC encoder is compiled anew in every process: %s", exc)
        return _compiled(digest, is_cached=False)


def _compiled(sources: str, *, is_cached: bool) -> Callable[..., Any]:
    @numba.njit(nogil=True, cache=is_cached)
    def encode_slice_data(
        samples: NDArray[Any],
        planes: NDArray[Any],
        num_rows: int,
        num_columns: int,
        grey: int,
        can_split: bool,
        width: int,
        height: int,
        pcm_bits: int,
        out: NDArray[Any],
        ends: NDArray[Any],
    ) -> int:
        """Code one picture.

        Args:
            samples: 1-D uint8 or uint16, three planes of whole CTUs.
            planes: [3, 3] int64: of each plane its first sample, its stride, log2 of its CTBs' side.
            num_rows: CTUs one above the other.
            num_columns: CTUs side by side.
            grey: ``1 << (BitDepth - 1)``.
            can_split: whether transform blocks may be split.
            pcm_rows: CTUs above this row and
            pcm_columns: left of this column are PCM samples of
            pcm_bits: bits each, and the picture is one substream; 0 = no CTU is PCM, and each row of
                CTUs is a substream (a row that starts anew would have to learn StatCoeff again).
            out: uint8, room for the slice data.
            ends: [num_rows] int64; gets where each row's substream ends in `out`; unless PCM, then 0.

        Returns:
            Bytes written; -1 = `out` is too small.
        """
        # Numba's cache looks at the file of the function that is called, and at what that closes over:
        # with this a change in any other file of the coder is seen.
        assert len(sources) > 0
        tokens = np.empty(_MAX_TOKENS, np.uint16)
        words = np.empty(len(out) // 4 + _MAX_CTU_WORDS + 8, np.uint32)
        residuals = np.empty(3 * CTB * CTB, np.int16)
        masks = np.zeros(3 * BLOCKS + 12, np.int64)
        tile = np.empty(256, np.int16)
        statistics = np.zeros(2, np.int64)
        engine = np.zeros(3, np.int64)
        states = _FIRST_STATES.copy()
        saved_states = _FIRST_STATES.copy()
        saved_statistics = np.zeros(2, np.int64)
        written = 0
        at = 0
        has_sync = pcm_bits == 0  # entropy_coding_sync_enabled_flag
        cabac.start_engine(engine)
        for row in range(num_rows):
            if has_sync and row > 0:  # 9.3.2.4: storage was after the second CTU of the row above
                at = 0
                cabac.start_engine(engine)
                states[:] = saved_states
                statistics[:] = saved_statistics
            for column in range(num_columns):
                if 4 * (at + _MAX_CTU_WORDS) > 4 * len(words) - 32:
                    return -1
                is_whole = CTB * (row + 1) <= height and CTB * (column + 1) <= width
                if pcm_bits and is_whole:
                    at = put_pcm_ctu(
                        samples, row, column, planes, pcm_bits, tokens, states, engine, words, at
                    )
                    count = 0
                else:
                    if pcm_bits:
                        fill_padding(samples, row, column, planes, width, height, grey)
                    count = put_coding_tree(
                        samples,
                        row,
                        column,
                        planes,
                        grey,
                        can_split,
                        pcm_bits > 0,
                        residuals,
                        masks,
                        tile,
                        statistics,
                        tokens,
                    )
                is_end = row == num_rows - 1 and column == num_columns - 1
                tokens[count] = _END_OF_SLICE_SEGMENT | (1 if is_end else 0)
                count += 1
                if has_sync and column == num_columns - 1 and not is_end:
                    tokens[count] = _END_OF_SUBSET
                    count += 1
                at = cabac.encode_bins(tokens, count, states, engine, words, at)
                if column == 1:
                    saved_states[:] = states
                    saved_statistics[:] = statistics
            if not has_sync and row < num_rows - 1:
                continue
            num_bytes = (32 * at + cabac.flush(engine, words, at) + 7) >> 3
            written = cabac.escape_words(words, num_bytes, out, written)
            if written < 0:
                return -1
            ends[row] = written
        return written

    return encode_slice_data
