"""Sixteen samples at a time: what numba's own loops do not turn into vector instructions.

A sub-block's samples and its sig_coeff_flags lie in *coding order*: index k is scan position 15 - k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from kvfetcher.codec.hevc.tables import SCAN_4X4

_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_BLOCK = ir.VectorType(_INT16, 16)


def _address(
    context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any
) -> ir.Value:
    """Pointer to an item of a C-contiguous array of one dimension; nothing is checked."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index], inbounds=True)


def _load(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType) -> ir.Value:
    load = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    load.align = vector.element.width // 8
    return load


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=2)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(_BLOCK, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(_BLOCK, ir.Undefined), ir.Constant(ir.VectorType(_INT32, 16), [0] * 16)
    )


@intrinsic
def residual_4x4(
    typing: Any, source: Any, at: Any, stride: Any, prediction: Any, out: Any, to: Any
) -> Any:
    """Residuals of the 4x4 samples at ``source[at]``, into ``out[to : to + 16]`` in coding order.

    Args:
        source: 1-D uint8, uint16 or int16.
        at: index of the first sample.
        stride: samples from one row to the next.
        prediction: subtracted from each.
        out: 1-D int16.
        to: index of the first residual.

    Returns:
        int64 mask: bit k = residual k is not 0.
    """
    signature = types.int64(source, types.int64, types.int64, types.int64, out, types.int64)

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source_, at_, stride_, prediction_, out_, to_ = args
        width = sig.args[0].dtype.bitwidth
        row_type = ir.VectorType(ir.IntType(width), 4)
        rows = []
        for row in range(4):
            offset = builder.add(at_, builder.mul(stride_, ir.Constant(_INT64, row)))
            pointer = _address(context, builder, sig.args[0], source_, offset)
            rows.append(_load(builder, pointer, row_type))
        pair = ir.Constant(ir.VectorType(_INT32, 8), list(range(8)))
        upper = builder.shuffle_vector(rows[0], rows[1], pair)
        lower = builder.shuffle_vector(rows[2], rows[3], pair)
        order = [4 * y + x for x, y in reversed(SCAN_4X4)]
        block = builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(_INT32, 16), order))
        if width < 16:
            block = builder.zext(block, _BLOCK)
        block = builder.sub(block, _splat(builder, builder.trunc(prediction_, _INT16)))
        _store(builder, block, _address(context, builder, sig.args[4], out_, to_))
        flags = builder.icmp_signed("!=", block, ir.Constant(_BLOCK, [0] * 16))
        return builder.zext(builder.bitcast(flags, _INT16), _INT64)

    return signature, build


@intrinsic
def put_sig_coeff_flags(
    typing: Any, tokens: Any, to: Any, residuals: Any, at: Any, table: Any, row: Any
) -> Any:
    """``tokens[to + k] = table[row + k] | (residuals[at + k] != 0)`` for k of 0 to 15.

    Args:
        tokens: 1-D uint16.
        to: index of the first token.
        residuals: 1-D int16.
        at: index of the first residual.
        table: 1-D uint16.
        row: index of the first context.
    """
    signature = types.void(tokens, types.int64, residuals, types.int64, table, types.int64)

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        tokens_, to_, residuals_, at_, table_, row_ = args
        block = _load(builder, _address(context, builder, sig.args[2], residuals_, at_), _BLOCK)
        bases = _load(builder, _address(context, builder, sig.args[4], table_, row_), _BLOCK)
        flags = builder.icmp_signed("!=", block, ir.Constant(_BLOCK, [0] * 16))
        coded = builder.or_(bases, builder.zext(flags, _BLOCK))
        _store(builder, coded, _address(context, builder, sig.args[0], tokens_, to_))
        return context.get_dummy_value()

    return signature, build


@intrinsic
def distance_16x16(typing: Any, source: Any, at: Any, stride: Any, prediction: Any) -> Any:
    """Sum of absolute differences of 16x16 samples from `prediction`.

    Args:
        source: 1-D uint8 or uint16, below 4096.
        at: index of the first sample.
        stride: samples from one row to the next.
        prediction: below 4096.
    """
    signature = types.int64(source, types.int64, types.int64, types.int64)

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source_, at_, stride_, prediction_ = args
        width = sig.args[0].dtype.bitwidth
        expected = _splat(builder, builder.trunc(prediction_, _INT16))
        total = ir.Constant(_BLOCK, [0] * 16)  # 16 differences of 12 bits fit without sign
        for row in range(16):
            offset = builder.add(at_, builder.mul(stride_, ir.Constant(_INT64, row)))
            pointer = _address(context, builder, sig.args[0], source_, offset)
            block = _load(builder, pointer, ir.VectorType(ir.IntType(width), 16))
            if width < 16:
                block = builder.zext(block, _BLOCK)
            above = builder.sub(block, expected)
            is_above = builder.icmp_unsigned(">", block, expected)
            total = builder.add(total, builder.select(is_above, above, builder.neg(above)))
        wide = builder.zext(total, ir.VectorType(_INT64, 16))
        result = ir.Constant(_INT64, 0)
        for k in range(16):
            result = builder.add(result, builder.extract_element(wide, ir.Constant(_INT32, k)))
        return result

    return signature, build


@intrinsic
def lowest_bit(typing: Any, value: Any) -> Any:
    """Index of the lowest bit of an int64 that is 1; undefined for 0."""

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build


@intrinsic
def leading_zeros(typing: Any, value: Any) -> Any:
    """Number of zeros above the highest bit of an int64 that is 1; undefined for 0."""

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build


@njit(nogil=True)
def as_int(value: Any) -> Any:
    """An integer of any type as int64: numba makes float64 of what mixes it with uint64."""
    return np.int64(value)
