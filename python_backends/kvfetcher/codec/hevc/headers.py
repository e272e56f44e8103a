"""Parameter sets, slice header and NAL units (H.265, 7.3.1 to 7.3.6), bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.format.pictures import Chroma

_IDR_W_RADL, _VPS_NUT, _SPS_NUT, _PPS_NUT = 19, 32, 33, 34
_FORMAT_RANGE_EXTENSIONS = 4
_LEVEL_6_2 = 186
LOG2_CTB = 5
_START_CODE = b"\0\0\0\1"


class BitWriter:
    """Syntax elements in a row, by their descriptors (7.2)."""

    def __init__(self) -> None:
        self._value = self.num_bits = 0

    def u(self, num_bits: int, *values: int) -> None:
        """Unsigned integers of `num_bits` bits each."""
        for value in values:
            assert 0 <= value < 1 << num_bits, (value, num_bits)
            self._value = self._value << num_bits | value
            self.num_bits += num_bits

    def ue(self, *values: int) -> None:
        """Exp-Golomb codes (9.2)."""
        for value in values:
            self.u(2 * (value + 1).bit_length() - 1, value + 1)

    def with_trailing_bits(self) -> bytes:
        """The bytes, after rbsp_trailing_bits() or byte_alignment(): a 1 and zeros."""
        self.u(1, 1)
        self.u(-self.num_bits % 8, 0)
        return self._value.to_bytes(self.num_bits // 8, "big")


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """All that parameter sets say."""

    width: int
    """Width of a picture, in luma samples."""
    height: int
    bit_depth: int
    chroma: Chroma
    has_pcm: bool

    @property
    def num_columns(self) -> int:
        """CTUs side by side."""
        return -(-self.width // (1 << LOG2_CTB))

    @property
    def num_rows(self) -> int:
        """CTUs one above the other."""
        return -(-self.height // (1 << LOG2_CTB))

    @property
    def has_wavefront(self) -> bool:
        """Whether each row of CTUs is a substream."""
        return not self.has_pcm

    @property
    def can_split(self) -> bool:
        """Whether transform blocks may be split."""
        return self.chroma == "4:4:4"


def parameter_sets(stream: StreamFormat) -> bytes:
    """The NAL units of VPS, SPS and PPS."""
    return b"".join(
        _START_CODE + nal_unit(kind, payload)
        for kind, payload in (
            (_VPS_NUT, _video_parameter_set(stream)),
            (_SPS_NUT, _sequence_parameter_set(stream)),
            (_PPS_NUT, _picture_parameter_set(stream)),
        )
    )


def nal_unit(kind: int, payload: bytes) -> bytes:
    """Header (7.3.1.2), and the payload with emulation prevention (7.3.1.1)."""
    out = bytearray((kind << 1, 1))
    zeros = 0
    for byte in payload:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def _profile_tier_level(bits: BitWriter, stream: StreamFormat) -> None:
    """7.3.3, and the general constraint flags of A.3.5."""
    bits.u(2, 0)  # general_profile_space
    bits.u(1, 0)  # general_tier_flag
    bits.u(5, _FORMAT_RANGE_EXTENSIONS)
    bits.u(32, 1 << (31 - _FORMAT_RANGE_EXTENSIONS))
    bits.u(1, 1, 0, 0, 1)  # progressive, interlaced, non-packed, frame only
    # at most 12, 10, 8 bits; 4:2:2, 4:2:0, monochrome; intra, one picture; lower bit rate
    depth = stream.bit_depth
    bits.u(1, 1, int(depth <= 10), int(depth <= 8))
    bits.u(1, *(2 * [int(stream.chroma == "4:2:0")]), 0, 1, 0, 1)
    bits.u(35, 0)
    bits.u(8, _LEVEL_6_2)  # general_level_idc: a decoder must not rely on it (docs/format.md)


def _video_parameter_set(stream: StreamFormat) -> bytes:
    bits = BitWriter()
    bits.u(4, 0)
    bits.u(1, 1, 1)  # vps_base_layer_internal_flag, vps_base_layer_available_flag
    bits.u(6, 0)
    bits.u(3, 0)  # vps_max_sub_layers_minus1
    bits.u(1, 1)
    bits.u(16, 0xFFFF)
    _profile_tier_level(bits, stream)
    bits.u(1, 1)
    bits.ue(0, 0, 0)  # one picture buffer, no reordering, no limit of latency
    bits.u(6, 0)
    bits.ue(0)
    bits.u(1, 0, 0)  # timing, extension
    return bits.with_trailing_bits()


def _sequence_parameter_set(stream: StreamFormat) -> bytes:
    bits = BitWriter()
    bits.u(4, 0)
    bits.u(3, 0)
    bits.u(1, 1)
    _profile_tier_level(bits, stream)
    is_444 = stream.chroma == "4:4:4"
    bits.ue(0, 3 if is_444 else 1)  # chroma_format_idc
    if is_444:
        bits.u(1, 0)  # separate_colour_plane_flag
    width, height = stream.num_columns << LOG2_CTB, stream.num_rows << LOG2_CTB
    bits.ue(width, height)
    has_window = (width, height) != (stream.width, stream.height)
    bits.u(1, int(has_window))
    if has_window:
        unit = 1 if is_444 else 2  # SubWidthC, SubHeightC
        bits.ue(0, (width - stream.width) // unit, 0, (height - stream.height) // unit)
    bits.ue(stream.bit_depth - 8, stream.bit_depth - 8)
    bits.ue(4)  # log2_max_pic_order_cnt_lsb_minus4
    bits.u(1, 1)
    bits.ue(0, 0, 0)
    bits.ue(LOG2_CTB - 3, 0)  # the smallest coding block is the largest one
    bits.ue(0, LOG2_CTB - 2)  # transform blocks of 4 to 32
    # max_transform_hierarchy_depth_inter, _intra
    bits.ue(0, 1 if stream.can_split else 0)
    bits.u(1, 0, 0, 0)  # scaling lists, amp, sao
    bits.u(1, int(stream.has_pcm))
    if stream.has_pcm:
        bits.u(4, stream.bit_depth - 1, stream.bit_depth - 1)
        bits.ue(LOG2_CTB - 3, 0)
        bits.u(1, 1)  # pcm_loop_filter_disabled_flag
    bits.ue(0)  # num_short_term_ref_pic_sets
    bits.u(1, 0, 0, 0, 0)  # long-term pictures, temporal mvp, strong smoothing, vui
    bits.u(1, 1)  # sps_extension_present_flag
    bits.u(1, 1)  # sps_range_extension_flag
    bits.u(7, 0)
    # rotation, context, implicit and explicit rdpcm, extended precision, smoothing disabled,
    # high precision offsets, persistent_rice_adaptation_enabled_flag, bypass alignment
    bits.u(1, 0, 0, 0, 0, 0, 0, 0, 1, 0)
    return bits.with_trailing_bits()


def _picture_parameter_set(stream: StreamFormat) -> bytes:
    bits = BitWriter()
    bits.ue(0, 0)
    bits.u(1, 0, 0)  # dependent slice segments, output flag
    bits.u(3, 0)
    bits.u(1, 0, 0)  # sign hiding, cabac_init
    bits.ue(0, 0)
    bits.ue(0)  # init_qp_minus26: SLICE_QP
    bits.u(1, 0, 0, 0)  # constrained intra, transform skip, cu_qp_delta
    bits.ue(0, 0)
    bits.u(1, 0, 0, 0)
    bits.u(1, 1)  # transquant_bypass_enabled_flag
    bits.u(1, 0)  # tiles
    bits.u(1, int(stream.has_wavefront))  # entropy_coding_sync_enabled_flag
    bits.u(1, 0)  # loop filter across slices
    bits.u(1, 1, 0, 1)  # deblocking control: no override, disabled
    bits.u(1, 0, 0)
    bits.ue(0)
    bits.u(1, 0, 0)
    return bits.with_trailing_bits()


def slice_header(stream: StreamFormat, substream_bytes: Sequence[int]) -> bytes:
    """Start code, NAL unit header and slice_segment_header() of a picture's only slice, an IDR's.

    Args:
        stream: as in the parameter sets.
        substream_bytes: of each row of CTUs, with emulation prevention.
    """
    bits = BitWriter()
    bits.u(1, 1, 0)  # first_slice_segment_in_pic_flag, no_output_of_prior_pics_flag
    bits.ue(0)
    bits.ue(2)  # slice_type I
    bits.ue(0)  # slice_qp_delta
    offsets = substream_bytes[:-1]
    if stream.has_wavefront:
        bits.ue(len(offsets))  # num_entry_point_offsets; there are two rows or more
        length = max(max(offsets) - 1, 1).bit_length()
        bits.ue(length - 1)
        bits.u(length, *(offset - 1 for offset in offsets))
    return _START_CODE + nal_unit(_IDR_W_RADL, bits.with_trailing_bits())
