// Lossless H.265 of 4:4:4 pictures: samples -> substreams, one for each row of coding tree blocks.
//
// The slice data is that of `kvfetcher.codec.hevc`, byte for byte: one slice, entropy_coding_sync,
// CTB = CU = 32, intra DC, cu_transquant_bypass, transform blocks of 32, or of 16 where their DC predicts
// better, persistent_rice_adaptation. Numbers of clauses and names of syntax elements are those of
// ITU-T H.265 (08/2021).
//
// plan     one warp per CTU     DC predictions, split or not, and of each sub-block the class of its first
//                               coeff_abs_level_remaining
// stats    one block per picture  StatCoeff (9.3.4.2.6) before each sub-block: serial, but cheap
// tokens   one warp per CTU     binarisation: a lane has one sub-block; bins as 16-bit tokens
// chain    one block per picture  contexts with which each row begins (9.3.2.4); a thread has one context
// arith    one thread per row   the arithmetic coder (9.3.4.3 turned around)
// measure, compact  one block per row  emulation prevention (7.4.2) and one dense buffer
//
// tokens, chain and arith work on a strip of a few columns of CTUs at a time: tokens are larger than
// the samples, and only those of a strip exist. A token is ``context << 1 | bin``, or
// ``0x8000 | number of bits << 11 | bits`` with 0 to 11 bypass bits, or neither where there are 0.
//
// Compiled by NVRTC without headers, and by a host compiler for tests (tests/support/cuda_on_host.h).

#ifndef __CUDACC_RTC__
#include <cstdint>
#else
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

#define DEVICE static __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// First context of each syntax element, as in `kvfetcher.codec.hevc.tables`.
enum {
    TERMINATE = 0,
    TRANSQUANT_BYPASS_FLAG = 1,
    PART_MODE = 2,
    PREV_INTRA_LUMA_PRED_FLAG = 3,
    INTRA_CHROMA_PRED_MODE = 4,
    SPLIT_TRANSFORM_FLAG = 5,
    CBF_LUMA = 8,
    CBF_CHROMA = 10,
    LAST_X_PREFIX = 15,
    LAST_Y_PREFIX = 33,
    CODED_SUB_BLOCK_FLAG = 51,
    SIG_COEFF_FLAG = 55,
    GREATER1_FLAG = 97,
    GREATER2_FLAG = 121,
    CONTEXT_BYTES = 128,  // one row's contexts in memory; 127 are used
};

enum {
    ALL = 0xFFFFFFFF,
    CTB = 32,
    SUB_BLOCKS = 192,  // of a CTU, in coding order
    TOKEN_BITS = 11,
    BYPASS = 0x8000,
    IS_WIDE = 1,
    IS_ALIGNED = 2,
    NO_REMAINING = 0xF0,
    WHOLE = 0, SPLIT = 1,  // a CTU's transform tree
    SPLIT_DCS = 12,
    PLAN_WARPS = 4,
    TOKEN_WARPS = 4,
    STAGE = 1024,
    CHAIN_THREADS = 128,
    CHAIN_TOKENS = 8 * CHAIN_THREADS,
    BYTE_THREADS = 128,
};

// What a split tree must gain, in units of the sum of absolute residuals (the enum above is unsigned).
#define SPLIT_COST 24

struct Picture {
    uint64_t samples;  // address of [3][height][stride], 8 or 16 bits
    int64_t plane;     // samples from one plane to the next
    int32_t stride, width, height;
    int32_t ctus, ctu_rows;  // of a row, of the picture
    int32_t first_row, first_ctu;  // among the batch's
    int32_t bit_depth, flags;
    int32_t reserved;
};

struct Plan { int16_t dc[3]; int16_t kind; };  // of a CTU; kind: WHOLE, SPLIT

struct RowState { uint64_t low; uint32_t range; int32_t count; int32_t words; int32_t failed; };

struct Batch {
    const Picture* pictures;
    const int32_t* row_picture;  // [rows]
    const int32_t* row_order;    // [rows] rows that neighbouring threads of `arith` take
    const uint8_t* scan8;        // [64] x | y << 3 of the up-right diagonal scan (6.5.3) of 8x8
    const uint32_t* range_lps;   // [128] by state << 1 | valMps: rangeTabLps, one byte for each range
    const uint8_t* next_state;   // [256] by (state << 1 | valMps) << 1 | bin
    const uint8_t* contexts;     // [CONTEXT_BYTES] states at the start of a slice
    Plan* plans;                 // [ctus]
    uint8_t* stats;              // [ctus][SUB_BLOCKS] classes, then StatCoeff
    uint16_t* tokens;            // [rows][columns][room]
    int32_t* counts;             // [rows][columns] tokens, a multiple of 8; -1 = more than the room
    uint8_t* starts;             // [rows][CONTEXT_BYTES] contexts at the start of the row, then of the strip
    RowState* states;            // [rows]
    uint32_t* words;             // [rows][words_room]
    int32_t* bits;               // [rows]; -1 = it did not fit
    int32_t* lengths;            // [rows] bytes with emulation prevention; 0 where it did not fit
    const int64_t* offsets;      // [rows] in `out`
    uint8_t* out;
    int32_t num_pictures, num_rows;
    int32_t first_column, columns;  // the strip
    int32_t room, words_room;
};

// ------------------------------------------------------------------------------------------ samples

DEVICE int sample(const Picture& p, int comp, int x, int y) {
    if (x >= p.width || y >= p.height) return 1 << (p.bit_depth - 1);
    int64_t at = comp * p.plane + (int64_t)y * p.stride + x;
    return p.flags & IS_WIDE ? ((const uint16_t*)p.samples)[at] : ((const uint8_t*)p.samples)[at];
}

DEVICE void four_samples(const Picture& p, int comp, int x, int y, int* v) {
    if (p.flags & IS_ALIGNED && x + 4 <= p.width && y < p.height) {
        int64_t at = comp * p.plane + (int64_t)y * p.stride + x;
        if (p.flags & IS_WIDE) {
            uint2 w = *(const uint2*)((const uint16_t*)p.samples + at);
            v[0] = w.x & 65535; v[1] = w.x >> 16; v[2] = w.y & 65535; v[3] = w.y >> 16;
        } else {
            uint32_t w = *(const uint32_t*)((const uint8_t*)p.samples + at);
            v[0] = w & 255; v[1] = w >> 8 & 255; v[2] = w >> 16 & 255; v[3] = w >> 24;
        }
    } else {
        for (int k = 0; k < 4; k++) v[k] = sample(p, comp, x + k, y);
    }
}

// Intra DC (8.4.4.2.5) of the block at (x, y), missing neighbours substituted (8.4.4.2.2); by one
// thread.
DEVICE int small_dc(const Picture& p, int comp, int x, int y, int log2, bool left, bool top) {
    if (!left && !top) return 1 << (p.bit_depth - 1);
    int size = 1 << log2, total = 0;
    for (int k = 0; k < size; k++) {
        if (left) total += sample(p, comp, x - 1, y + k);
        if (top) total += sample(p, comp, x + k, y - 1);
    }
    if (!top) total += size * sample(p, comp, x - 1, y);
    if (!left) total += size * sample(p, comp, x, y - 1);
    return (total + size) >> (log2 + 1);
}

DEVICE int warp_sum(int v) {
    for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(ALL, v, step);
    return v;
}

// The same of a whole CTU, by a warp.
DEVICE int ctu_dc(const Picture& p, int comp, int x, int y, bool left, bool top, int lane) {
    if (!left && !top) return 1 << (p.bit_depth - 1);
    int mine = 0;
    if (left) mine += sample(p, comp, x - 1, y + lane);
    if (top) mine += sample(p, comp, x + lane, y - 1);
    int total = warp_sum(mine);
    if (!top) total += CTB * sample(p, comp, x - 1, y);
    if (!left) total += CTB * sample(p, comp, x, y - 1);
    return (total + CTB) >> 6;
}

// ---------------------------------------------------------------------- sub-blocks in coding order

// Scan position n of a 4x4 block lies at x | y << 2: nibble n.
#define SCAN4 0xFBE7AD369C258140ull

struct SubBlock {
    int comp;
    int log2;     // of its transform block
    int first;    // number of the block's first sub-block in coding order
    int reverse;  // its own number behind that; the scan runs from the last sub-block to the first
    int x, y;     // in the CTU, in sub-blocks
    int bx, by;   // of its transform block, likewise
};

DEVICE SubBlock locate(int k, int kind, const uint8_t* scan8) {
    SubBlock s;
    if (kind == WHOLE) {
        s.comp = k >> 6; s.log2 = 5; s.reverse = k & 63; s.bx = s.by = 0;
        int at = scan8[63 - s.reverse];
        s.x = at & 7; s.y = at >> 3;
    } else {
        int q = k / 48, m = k % 48;
        s.bx = 4 * (q & 1); s.by = 4 * (q >> 1);
        s.comp = m >> 4; s.log2 = 4; s.reverse = m & 15;
        int at = (int)(SCAN4 >> (4 * (15 - s.reverse)) & 15);
        s.x = s.bx + (at & 3); s.y = s.by + (at >> 2);
    }
    s.first = k - s.reverse;
    return s;
}

// DC of the blocks of a split CTU, numbered 4 * component + quadrant.
DEVICE void split_dcs(const Picture& p, int x0, int y0, int lane, int16_t* dcs) {
    if (lane >= SPLIT_DCS) return;
    int q = lane & 3, x = x0 + 16 * (q & 1), y = y0 + 16 * (q >> 1);
    dcs[lane] = (int16_t)small_dc(p, lane >> 2, x, y, 4, x > 0, y > 0);
}

// Residuals of a sub-block, in scan order.
DEVICE void residuals(const Picture& p, int x0, int y0, const SubBlock& s, const Plan& plan, const int16_t* dcs, int* c) {
    int v[16];
#pragma unroll
    for (int r = 0; r < 4; r++) four_samples(p, s.comp, x0 + 4 * s.x, y0 + 4 * s.y + r, v + 4 * r);
    if (plan.kind == WHOLE) {
        int dc = s.comp == 0 ? plan.dc[0] : s.comp == 1 ? plan.dc[1] : plan.dc[2];
#pragma unroll
        for (int n = 0; n < 16; n++) v[n] -= dc;
    } else {
        int q = (s.y >> 2) << 1 | s.x >> 2, dc = dcs[4 * s.comp + q], bx = x0 + 4 * s.bx, by = y0 + 4 * s.by;
        bool left = bx > 0, top = by > 0, is_filtered = s.comp == 0 && (left || top);
        bool is_left = s.x == s.bx, is_top = s.y == s.by;
#pragma unroll
        for (int n = 0; n < 16; n++) {
            int pred = dc;
            // The filter of DC's edges (8.4.4.2.6), luma only.
            if (is_filtered && ((is_left && !(n & 3)) || (is_top && n < 4))) {
                int x = x0 + 4 * s.x + (n & 3), y = y0 + 4 * s.y + (n >> 2);
                int h = left ? sample(p, 0, bx - 1, y) : sample(p, 0, bx, by - 1);
                int w = top ? sample(p, 0, x, by - 1) : sample(p, 0, bx - 1, by);
                if (x == bx && y == by) pred = (h + 2 * dc + w + 2) >> 2;
                else pred = ((y == by ? w : h) + 3 * dc + 2) >> 2;
            }
            v[n] -= pred;
        }
    }
#pragma unroll
    for (int n = 0; n < 16; n++) c[n] = v[(int)(SCAN4 >> (4 * n) & 15)];
}

// What of |c| is left for coeff_abs_level_remaining: 9.3.4.2.6's baseLevel for coefficient n, of which
// `seen` were before it. `second`: position of the one that has coeff_abs_level_greater2_flag.
DEVICE int base_level(int n, int seen, int second) { return seen < 8 ? (n == second ? 3 : 2) : 1; }

// ---------------------------------------------------------------------------------------------- plan

// Class of a first coeff_abs_level_remaining: for how many k it is at least 3 << k, and from which k on
// twice it is below 1 << k. That is all that StatCoeff looks at.
DEVICE int remaining_class(int v) {
    int more = v < 3 ? 0 : 32 - __clz(v / 3), less = v ? 33 - __clz(v) : 0;
    return more | less << 4;
}

KERNEL(32 * PLAN_WARPS) plan(Batch b) {
    __shared__ int16_t shared_dcs[PLAN_WARPS][SPLIT_DCS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int row = blockIdx.x, column = blockIdx.y * PLAN_WARPS + warp;
    const Picture p = b.pictures[b.row_picture[row]];
    if (column >= p.ctus) return;
    int y = row - p.first_row, x0 = CTB * column, y0 = CTB * y;
    int64_t ctu = p.first_ctu + (int64_t)y * p.ctus + column;
    bool left = column > 0, top = y > 0;
    Plan plan;
    plan.kind = WHOLE;
    for (int comp = 0; comp < 3; comp++) plan.dc[comp] = (int16_t)ctu_dc(p, comp, x0, y0, left, top, lane);
    int16_t* dcs = shared_dcs[warp];
    split_dcs(p, x0, y0, lane, dcs);
    __syncwarp();
    int is_nearer = 0;  // by how much four blocks are nearer to their DC than one
    for (int comp = 0; comp < 3; comp++)
        for (int k = 0; k < CTB; k++) {
            int v = sample(p, comp, x0 + lane, y0 + k);
            is_nearer += abs(v - plan.dc[comp]) - abs(v - dcs[4 * comp + 2 * (k >> 4) + (lane >> 4)]);
        }
    if (warp_sum(is_nearer) > SPLIT_COST) plan.kind = SPLIT;
    for (int k = lane; k < SUB_BLOCKS; k += 32) {
        SubBlock s = locate(k, plan.kind, b.scan8);
        int c[16];
        residuals(p, x0, y0, s, plan, dcs, c);
        int seen = 0, second = -1, found = NO_REMAINING;
#pragma unroll
        for (int n = 15; n >= 0; n--) {
            if (c[n] == 0) continue;
            if (seen < 8 && second < 0 && abs(c[n]) > 1) second = n;
            seen++;
        }
        seen = 0;
#pragma unroll
        for (int n = 15; n >= 0; n--) {
            int a = abs(c[n]);
            if (a == 0) continue;
            int v = a - base_level(n, seen, second);
            if (v >= 0 && found == NO_REMAINING) found = remaining_class(v);
            seen++;
        }
        b.stats[ctu * SUB_BLOCKS + k] = (uint8_t)found;
    }
    if (lane == 0) b.plans[ctu] = plan;
}

// --------------------------------------------------------------------------------------------- stats

DEVICE int is_chroma(int k, int kind) {
    if (kind == WHOLE) return k >= 64;
    return k % 48 >= 16;
}

// StatCoeff of luma or chroma through one CTU (9.3.4.2.6); stores what it is before each sub-block.
DEVICE int through_ctu(uint8_t* stats, int kind, int chroma, int q, bool stores) {
    const uint4* all = (const uint4*)stats;
    int first = kind == WHOLE && chroma ? 4 : 0, stop = kind == WHOLE && !chroma ? 4 : 12;
    for (int start = first; start < stop; start += 4) {
        uint4 v[4] = {all[start], all[start + 1], all[start + 2], all[start + 3]};
#pragma unroll
        for (int j = 0; j < 16; j++) {
            uint32_t word = j & 2 ? (j & 1 ? v[j >> 2].w : v[j >> 2].z) : (j & 1 ? v[j >> 2].y : v[j >> 2].x);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int number = 16 * start + 4 * j + k;
                if (kind != WHOLE && is_chroma(number, kind) != chroma) continue;
                int more = word >> (8 * k) & 15, less = word >> (8 * k + 4) & 15, rice = q >> 2;
                if (stores) stats[number] = (uint8_t)q;
                q += rice < more ? 1 : rice >= less && q > 0 ? -1 : 0;
            }
        }
    }
    return q;
}

KERNEL(256) stats(Batch b) {
    __shared__ uint8_t starts[2][256];
    const Picture p = b.pictures[blockIdx.x];
    const Plan* plans = b.plans + p.first_ctu;
    uint8_t* all = b.stats + (int64_t)p.first_ctu * SUB_BLOCKS;
    if (threadIdx.x < 2) {
        int q = 0;
        for (int y = 0; y < p.ctu_rows; y++) {
            starts[threadIdx.x][y] = (uint8_t)q;
            for (int x = 0; x < 2 && p.ctus > 1; x++) {
                int ctu = y * p.ctus + x;
                q = through_ctu(all + (int64_t)ctu * SUB_BLOCKS, plans[ctu].kind, threadIdx.x, q, false);
            }
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 2 * p.ctu_rows; j += blockDim.x) {
        int y = j >> 1, chroma = j & 1, q = starts[chroma][y];
        for (int x = 0; x < p.ctus; x++) {
            int ctu = y * p.ctus + x;
            q = through_ctu(all + (int64_t)ctu * SUB_BLOCKS, plans[ctu].kind, chroma, q, true);
        }
    }
}

// -------------------------------------------------------------------------------------------- tokens

// Writes tokens, or counts them.
template <bool STORES> struct Writer {
    uint16_t* to;
    int count;
    uint32_t pending;
    int have;  // bits in `pending`

    __device__ __forceinline__ void put(uint32_t token) {
        if (STORES) to[count] = (uint16_t)token;
        count++;
    }
    __device__ __forceinline__ void bin(int context, int value) { put(context << 1 | value); }
    __device__ __forceinline__ void bypass(uint32_t value, int bits) {  // at most 21 at a time
        pending = pending << bits | value;
        have += bits;
        while (have >= TOKEN_BITS) {
            have -= TOKEN_BITS;
            put(BYPASS | TOKEN_BITS << 11 | (pending >> have & 2047));
        }
        pending &= (1u << have) - 1;
    }
    __device__ __forceinline__ void flush() {
        if (have) put(BYPASS | have << 11 | pending);
        have = 0; pending = 0;
    }
};

// Coded sub-blocks of a CTU and what lanes need of one another, by number in coding order.
struct Coded {
    uint32_t coded[6];     // has a coefficient that is not 0
    uint32_t greater1[6];  // has one of more than 1 among its first 8
    uint32_t raster[3][2];  // coded, by component and 8 * y + x
};

DEVICE uint64_t coded_at(const Coded& c, int comp) { return (uint64_t)c.raster[comp][1] << 32 | c.raster[comp][0]; }
DEVICE int any16(uint64_t raster, int q) { return (raster >> (32 * (q >> 1) + 4 * (q & 1)) & 0x0F0F0F0Full) != 0; }
DEVICE uint64_t window(const uint32_t* words, const SubBlock& s) {
    if (s.log2 == 5) return (uint64_t)words[2 * s.comp + 1] << 32 | words[2 * s.comp];
    return words[s.first >> 5] >> (s.first & 31) & 65535;
}

// last_sig_coeff_x_prefix ... _y_suffix (7.3.8.11, 9.3.4.2.3).
template <bool STORES> DEVICE void last_position(Writer<STORES>& w, int x, int y, int comp, int log2) {
    int suffix[2], bits[2];
#pragma unroll
    for (int axis = 0; axis < 2; axis++) {
        int v = axis ? y : x, prefix = v;
        suffix[axis] = bits[axis] = 0;
        if (v > 3) {
            int top = 31 - __clz(v);
            prefix = 2 * top + (v >> (top - 1) & 1);
            bits[axis] = top - 1;
            suffix[axis] = v & ((1 << (top - 1)) - 1);
        }
        int base = axis ? LAST_Y_PREFIX : LAST_X_PREFIX, shift;
        if (comp) { base += 15; shift = log2 - 2; }
        else { base += 3 * (log2 - 2) + ((log2 - 1) >> 2); shift = (log2 + 1) >> 2; }
        for (int j = 0; j < prefix; j++) w.bin(base + (j >> shift), 1);
        if (prefix < 2 * log2 - 1) w.bin(base + (prefix >> shift), 0);
    }
    if (bits[0]) w.bypass(suffix[0], bits[0]);
    if (bits[1]) w.bypass(suffix[1], bits[1]);
    w.flush();
}

// sigCtx by scan position, two bits each (9.3.4.2.5); neighbours: right is coded | below is coded << 1.
DEVICE uint32_t sig_pattern(int neighbours) {
    if (neighbours == 0) return 0x556u;
    return neighbours == 1 ? 0x1090926u : neighbours == 2 ? 0x10619Au : 0xAAAAAAAAu;
}

// Coefficients of a sub-block from scan position `start` down to `stop` (7.3.8.11).
template <bool STORES>
DEVICE void coefficients(Writer<STORES>& w, int* c, uint32_t mask, int start, int stop, uint32_t pattern, int sig, bool is_first, int comp,
                         int after_greater1, int stat) {
#pragma unroll
    for (int n = 15; n >= 0; n--)
        if (n <= start && n >= stop) {
            int context = is_first && n == 0 ? (comp ? SIG_COEFF_FLAG + 27 : SIG_COEFF_FLAG) : sig + (pattern >> (2 * n) & 3);
            w.bin(context, mask >> n & 1);
        }
    if (!mask) return;
    int set = (is_first || comp ? 0 : 2) + after_greater1, greater1 = GREATER1_FLAG + 4 * set + (comp ? 16 : 0);
    int context = 1, seen = 0, second = -1, is_more = 0;
    uint32_t signs = 0;
#pragma unroll
    for (int n = 15; n >= 0; n--) {
        int v = c[n];
        if (v == 0) continue;
        signs = signs << 1 | (v < 0);
        int a = abs(v);
        c[n] = a;
        if (seen < 8) {
            w.bin(greater1 + context, a > 1);
            if (a > 1) {
                context = 0;
                if (second < 0) { second = n; is_more = a > 2; }
            } else if (context > 0 && context < 3) context++;
        }
        seen++;
    }
    if (second >= 0) w.bin(GREATER2_FLAG + set + (comp ? 4 : 0), is_more);
    w.bypass(signs, seen);
    int rice = stat >> 2;
    seen = 0;
#pragma unroll
    for (int n = 15; n >= 0; n--) {
        int a = c[n];
        if (a == 0) continue;
        int v = a - base_level(n, seen, second);
        seen++;
        if (v < 0) continue;
        if (v < (3 << rice)) {  // 9.3.3.11
            int prefix = v >> rice;
            w.bypass((((1u << (prefix + 1)) - 2) << rice) | (v & ((1 << rice) - 1)), prefix + 1 + rice);
        } else {
            int length = rice, rest = v - (3 << rice);
            while (rest >= 1 << length) { rest -= 1 << length; length++; }
            int prefix = 4 + length - rice;
            while (prefix > 12) { w.bypass(255, 8); prefix -= 8; }
            w.bypass((1u << prefix) - 2, prefix);
            if (length) w.bypass(rest, length);
        }
        if (a > (3 << rice)) rice++;
    }
    w.flush();
}

// Tokens of sub-block k of a CTU, with the syntax that stands before and behind it.
template <bool STORES>
DEVICE void sub_block(Writer<STORES>& w, int k, int kind, const SubBlock& s, const Coded& coded, int* c, int stat, bool ends_row, bool ends_slice) {
    if (k == 0) {  // coding_unit (7.3.8.5), intra DC for all
        w.bin(TRANSQUANT_BYPASS_FLAG, 1);
        w.bin(PART_MODE, 1);
        w.bin(PREV_INTRA_LUMA_PRED_FLAG, 1);
        w.bypass(2, 2);  // mpm_idx 1
        w.flush();
        w.bin(INTRA_CHROMA_PRED_MODE, 0);
        w.bin(SPLIT_TRANSFORM_FLAG, kind != WHOLE);
        w.bin(CBF_CHROMA, coded_at(coded, 1) != 0);
        w.bin(CBF_CHROMA, coded_at(coded, 2) != 0);
        if (kind == WHOLE) w.bin(CBF_LUMA + 1, coded_at(coded, 0) != 0);
    }
    if (kind != WHOLE && s.comp == 0 && s.reverse == 0) {  // transform_tree (7.3.8.8)
        uint64_t luma = coded_at(coded, 0), cb = coded_at(coded, 1), cr = coded_at(coded, 2);
        int q = k / 48;
        if (cb) w.bin(CBF_CHROMA + 1, any16(cb, q));
        if (cr) w.bin(CBF_CHROMA + 1, any16(cr, q));
        w.bin(CBF_LUMA, any16(luma, q));
    }
    uint64_t block = window(coded.coded, s);
    int last = block ? __ffsll(block) - 1 : 64;
    int count = 1 << (2 * s.log2 - 4), side = 1 << (s.log2 - 2);
    if (s.reverse >= last) {
        uint32_t mask = 0;
#pragma unroll
        for (int n = 0; n < 16; n++) mask |= (uint32_t)(c[n] != 0) << n;
        bool is_first = s.reverse == count - 1, is_last = s.reverse == last;
        uint64_t raster = coded_at(coded, s.comp);
        int x = s.x - s.bx, y = s.y - s.by, at = 8 * s.y + s.x;
        int right = x + 1 < side ? (int)(raster >> (at + 1) & 1) : 0, below = y + 1 < side ? (int)(raster >> (at + 8) & 1) : 0;
        bool has_flag = !is_last && !is_first;
        if (has_flag) w.bin(CODED_SUB_BLOCK_FLAG + (s.comp ? 2 : 0) + (right | below), mask != 0);
        if (mask || is_first) {
            int start = 15;
            if (is_last) {
                int n = 31 - __clz(mask), z = (int)(SCAN4 >> (4 * n) & 15);
                last_position(w, 4 * x + (z & 3), 4 * y + (z >> 2), s.comp, s.log2);
                start = n - 1;
            }
            uint64_t before = block & ((1ull << s.reverse) - 1);
            int after = before ? (int)(window(coded.greater1, s) >> (63 - __clzll(before)) & 1) : 0;
            int sig = SIG_COEFF_FLAG;
            if (s.comp) sig += 27 + 12;
            else sig += 21 + (is_first ? 0 : 3);
            uint32_t pattern = sig_pattern(right | below << 1);
            coefficients(w, c, mask, start, has_flag && mask == 1 ? 1 : 0, pattern, sig, is_first, s.comp, after, stat);
        }
    }
    if (k == SUB_BLOCKS - 1) {
        w.bin(TERMINATE, ends_slice);  // end_of_slice_segment_flag
        if (ends_row && !ends_slice) w.bin(TERMINATE, 1);  // end_of_subset_one_bit
    }
}

KERNEL(32 * TOKEN_WARPS) tokens(Batch b) {
    // A sub-block's residuals are 8 words, and a ninth keeps lanes on different banks.
    __shared__ uint32_t shared_residuals[TOKEN_WARPS][SUB_BLOCKS * 9];
    __shared__ uint16_t shared_stage[TOKEN_WARPS][STAGE];
    __shared__ Coded shared_coded[TOKEN_WARPS];
    __shared__ int16_t shared_dcs[TOKEN_WARPS][SPLIT_DCS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int row = blockIdx.x, column = blockIdx.y * TOKEN_WARPS + warp, x = b.first_column + column;
    const Picture p = b.pictures[b.row_picture[row]];
    if (column >= b.columns || x >= p.ctus) return;
    uint32_t* kept = shared_residuals[warp];
    uint16_t* stage = shared_stage[warp];
    Coded& coded = shared_coded[warp];
    int y = row - p.first_row, x0 = CTB * x, y0 = CTB * y;
    int64_t ctu = p.first_ctu + (int64_t)y * p.ctus + x, slot = (int64_t)row * b.columns + column;
    const Plan plan = b.plans[ctu];
    const uint8_t* stats = b.stats + ctu * SUB_BLOCKS;
    if (plan.kind != WHOLE) split_dcs(p, x0, y0, lane, shared_dcs[warp]);
    if (lane < 6) coded.raster[lane >> 1][lane & 1] = 0;
    __syncwarp();
    for (int j = 0; j < 6; j++) {
        int k = 32 * j + lane, c[16], seen = 0, any = 0, greater1 = 0;
        SubBlock s = locate(k, plan.kind, b.scan8);
        residuals(p, x0, y0, s, plan, shared_dcs[warp], c);
#pragma unroll
        for (int n = 15; n >= 0; n--) {
            any |= c[n];
            if (seen < 8 && abs(c[n]) > 1) greater1 = 1;
            seen += c[n] != 0;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) kept[9 * k + n] = (uint32_t)(c[2 * n] & 65535) | (uint32_t)c[2 * n + 1] << 16;
        uint32_t are_coded = __ballot_sync(ALL, any != 0), are_greater1 = __ballot_sync(ALL, greater1);
        if (lane == 0) { coded.coded[j] = are_coded; coded.greater1[j] = are_greater1; }
        if (any) atomicOr(&coded.raster[s.comp][s.y >> 2], 1u << (8 * (s.y & 3) + s.x));
    }
    __syncwarp();
    uint16_t* to = b.tokens + slot * b.room;
    bool ends_row = x == p.ctus - 1, ends_slice = ends_row && y == p.ctu_rows - 1;
    int total = 0;
    for (int j = 0; j < 6; j++) {
        int k = 32 * j + lane, c[16], stat = stats[k];
        SubBlock s = locate(k, plan.kind, b.scan8);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            uint32_t two = kept[9 * k + n];
            c[2 * n] = (int16_t)(two & 65535);
            c[2 * n + 1] = (int)two >> 16;
        }
        Writer<false> counter = {0, 0, 0, 0};
        sub_block(counter, k, plan.kind, s, coded, c, stat, ends_row, ends_slice);
        int end = counter.count;
        for (int step = 1; step < 32; step <<= 1) {
            int other = __shfl_up_sync(ALL, end, step);
            if (lane >= step) end += other;
        }
        int here = __shfl_sync(ALL, end, 31);
        if (total + here + 7 > b.room) {
            if (lane == 0) b.counts[slot] = -1;
            return;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {  // counting made them absolute
            uint32_t two = kept[9 * k + n];
            c[2 * n] = (int16_t)(two & 65535);
            c[2 * n + 1] = (int)two >> 16;
        }
        bool is_staged = here <= STAGE;
        Writer<true> writer = {(is_staged ? stage : to + total) + end - counter.count, 0, 0, 0};
        sub_block(writer, k, plan.kind, s, coded, c, stat, ends_row, ends_slice);
        __syncwarp();
        if (is_staged)
            for (int n = lane; n < here; n += 32) to[total + n] = stage[n];
        __syncwarp();
        total += here;
    }
    int padded = (total + 7) & ~7;
    if (lane < padded - total) to[total + lane] = BYPASS;
    if (lane == 0) b.counts[slot] = padded;
}

// --------------------------------------------------------------------------------------------- chain

// Of the strip that begins with column 0. A thread looks through all tokens for those of its context,
// gathers their bins, and takes four steps from state to state with one look into a table.
KERNEL(CHAIN_THREADS) chain(Batch b) {
    __shared__ uint8_t next[256], next4[128 * 16];
    __shared__ uint4 staged[CHAIN_THREADS];
    const Picture p = b.pictures[blockIdx.x];
    int me = threadIdx.x;
    for (int j = me; j < 256; j += CHAIN_THREADS) next[j] = b.next_state[j];
    __syncthreads();
    for (int j = me; j < 128 * 16; j += CHAIN_THREADS) {
        uint32_t s = j >> 4;
        for (int k = 3; k >= 0; k--) s = next[s << 1 | (j >> k & 1)];
        next4[j] = (uint8_t)s;
    }
    // Neighbouring contexts are busy at the same time: they go to different warps.
    uint32_t context = (me & 31) << 2 | me >> 5, wanted = context << 1 | context << 17;
    uint32_t first = b.contexts[context], state = first;
    b.starts[(int64_t)p.first_row * CONTEXT_BYTES + context] = (uint8_t)first;
    __syncthreads();
    for (int y = 0; y < p.ctu_rows - 1; y++) {
        int row = p.first_row + y;
        uint32_t bins = 1;  // those that wait, behind a 1
        for (int column = 0; column < 2 && p.ctus > 1; column++) {
            int64_t slot = (int64_t)row * b.columns + column;
            const uint4* from = (const uint4*)(b.tokens + slot * b.room);
            int count = b.counts[slot];
            for (int at = 0; 8 * at < count; at += CHAIN_THREADS) {
                if (8 * (at + me) < count) staged[me] = from[at + me];
                __syncthreads();
                int stop = min(count / 8 - at, CHAIN_THREADS);
                for (int j = 0; j < stop; j++) {
                    uint4 v = staged[j];
                    uint32_t w[4] = {v.x ^ wanted, v.y ^ wanted, v.z ^ wanted, v.w ^ wanted};
#pragma unroll
                    for (int n = 0; n < 4; n++) {  // at most 3 bins are left from before, and 8 come
                        if (!(w[n] & 65534)) bins = bins << 1 | (w[n] & 1);
                        if (!(w[n] >> 17)) bins = bins << 1 | (w[n] >> 16 & 1);
                    }
                    while (bins >= 16) {
                        int left = 27 - __clz(bins);
                        state = next4[state << 4 | (bins >> left & 15)];
                        bins = 1u << left | (bins & ((1u << left) - 1));
                    }
                }
                __syncthreads();
            }
        }
        for (int left = 30 - __clz(bins); left >= 0; left--) state = next[state << 1 | (bins >> left & 1)];
        b.starts[(int64_t)(row + 1) * CONTEXT_BYTES + context] = (uint8_t)(p.ctus > 1 ? state : first);
    }
}

// --------------------------------------------------------------------------------------------- arith

// ivlLow in 64 bits: the bits from bit 9 + count on are complete, but for a carry.
struct Coder {
    uint64_t low;
    uint32_t range;
    int count;
    int words, room;
    uint32_t* to;
};

DEVICE void add_carry(Coder& a) {
    int at = a.words - 1;
    while (at > 0 && a.to[at] == 0xFFFFFFFFu) a.to[at--] = 0;
    a.to[at]++;
}

// At most 53 bits are waiting: after two tokens.
DEVICE void drain(Coder& a) {
    if (a.count < 32) return;
    int shift = a.count - 22;
    uint64_t word = a.low >> shift;
    a.low -= word << shift;
    a.count -= 32;
    if (word >> 32 && a.words <= a.room) add_carry(a);
    if (a.words < a.room) a.to[a.words] = (uint32_t)word;
    a.words++;
}

// One token whose context is in `state`; returns the next state (9.3.4.3.2, 9.3.4.3.4). Without
// branches, because lanes have tokens of both kinds at the same time.
DEVICE uint32_t code(Coder& a, uint32_t token, uint32_t state, const uint2* table) {
    uint2 entry = table[state];
    bool is_bypass = token & BYPASS, is_lps = !is_bypass && ((token ^ state) & 1);
    uint32_t lps_range = __byte_perm(entry.x, 0, 0x4440 | (a.range >> 6 & 3)), mps_range = a.range - lps_range;
    uint32_t range = is_lps ? lps_range : mps_range;
    int shift = is_bypass ? (int)(token >> TOKEN_BITS & 15) : __clz(range) - 23;
    uint32_t add = is_bypass ? (token & 2047) * a.range : is_lps ? mps_range << shift : 0;
    a.low = (a.low << shift) + add;
    a.range = is_bypass ? a.range : range << shift;
    a.count += shift;
    uint32_t next = __byte_perm(entry.y, 0, is_lps ? 0x4441 : 0x4440);
    return is_bypass ? state : next;
}

// Where a lane keeps the context of a token. For bypass bits it is some context, which stays as it is.
DEVICE int context_place(uint32_t token, int lane) { return (token >> 1 & 127) * 32 + lane; }

KERNEL(32) arith(Batch b) {
    __shared__ uint32_t contexts[CONTEXT_BYTES * 32];  // a word each: no lane waits for another's bank
    __shared__ uint2 table[128];
    int me = threadIdx.x, at = blockIdx.x * 32 + me;
    for (int j = me; j < 128; j += 32) {
        uint2 entry;
        entry.x = b.range_lps[j];
        entry.y = b.next_state[2 * j + (j & 1)] | (uint32_t)b.next_state[2 * j + 1 - (j & 1)] << 8;
        table[j] = entry;
    }
    __syncwarp();
    if (at >= b.num_rows) return;
    int row = b.row_order[at];
    const Picture p = b.pictures[b.row_picture[row]];
    if (b.first_column >= p.ctus) return;
    uint32_t* kept = (uint32_t*)(b.starts + (int64_t)row * CONTEXT_BYTES);
    for (int j = 0; j < CONTEXT_BYTES / 4; j++) {
        uint32_t four = kept[j];
#pragma unroll
        for (int k = 0; k < 4; k++) contexts[(4 * j + k) * 32 + me] = four >> (8 * k) & 255;
    }
    RowState state = {0, 510, -1, 0, 0};
    if (b.first_column > 0) state = b.states[row];
    Coder a = {state.low, state.range, state.count, state.words, b.words_room - 2, b.words + (int64_t)row * b.words_room};
    int columns = min(b.columns, p.ctus - b.first_column);
    for (int column = 0; column < columns; column++) {
        int64_t slot = (int64_t)row * b.columns + column;
        int count = b.counts[slot];
        if (count < 0) { state.failed = 1; continue; }
        const uint4* from = (const uint4*)(b.tokens + slot * b.room);
        uint4 ahead = from[0];
        // A token's state is read before that of the one before is written, which is passed on by hand.
        uint32_t token = ahead.x & 65535;
        int place = context_place(token, me);
        uint32_t context = contexts[place];
        for (int j = 0; 8 * j < count; j++) {
            uint4 v = ahead;
            if (8 * (j + 1) < count) ahead = from[j + 1];
            uint32_t w[5] = {v.x, v.y, v.z, v.w, ahead.x};
#pragma unroll
            for (int n = 0; n < 8; n++) {
                uint32_t following = n & 1 ? w[(n + 1) >> 1] & 65535 : w[n >> 1] >> 16;
                int next_place = context_place(following, me);
                uint32_t next_context = contexts[next_place];
                uint32_t made = code(a, token, context, table);
                contexts[place] = made;
                context = next_place == place ? made : next_context;
                place = next_place;
                token = following;
                if (n & 1) drain(a);
            }
        }
    }
    bool is_over = b.first_column + columns == p.ctus;
    if (!is_over) {
        for (int j = 0; j < CONTEXT_BYTES / 4; j++) {
            uint32_t four = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) four |= contexts[(4 * j + k) * 32 + me] << (8 * k);
            kept[j] = four;
        }
        state.low = a.low; state.range = a.range; state.count = a.count; state.words = a.words;
        b.states[row] = state;
        return;
    }
    // The last bin was a terminating one, of an interval of 2; a stop bit and zeros follow.
    int bits = a.count + 3;
    uint64_t rest = a.low >> 7 | 1;
    if (a.words > a.room) state.failed = 1;
    if (!state.failed) {
        if (rest >> bits) { add_carry(a); rest -= 1ull << bits; }
        if (bits <= 32) {
            a.to[a.words] = (uint32_t)(rest << (32 - bits));
        } else {
            a.to[a.words] = (uint32_t)(rest >> (bits - 32));
            a.to[a.words + 1] = (uint32_t)(rest << (64 - bits));
        }
    }
    b.bits[row] = state.failed ? -1 : 32 * a.words + bits;
}

// --------------------------------------------------------------------------------------------- bytes

DEVICE int byte_at(const uint32_t* words, int i) { return words[i >> 2] >> (24 - 8 * (i & 3)) & 255; }

// Whether an emulation_prevention_three_byte goes before byte i: it is 3 at most, and the zeros before
// it, of which every second makes one of its own, are an even number.
DEVICE bool is_prevented(const uint32_t* words, int i) {
    if (i < 2 || byte_at(words, i) > 3) return false;
    int zeros = 0;
    while (zeros < i && byte_at(words, i - 1 - zeros) == 0) zeros++;
    return zeros >= 2 && zeros % 2 == 0;
}

// Of bytes 4 j to 4 j + 3, those below n.
DEVICE int prevented_in_word(const uint32_t* words, int j, int n) {
    uint64_t two = (uint64_t)(j ? words[j - 1] : 0xFFFFFFFFu) << 32 | words[j];
    int found = 0;
    for (int k = 0; k < 4; k++)
        if (!(two >> (24 - 8 * k) & 0xFFFFFC) && 4 * j + k < n) found += is_prevented(words, 4 * j + k);
    return found;
}

KERNEL(BYTE_THREADS) measure(Batch b) {
    __shared__ int found;
    int row = blockIdx.x, bits = b.bits[row], n = bits < 0 ? 0 : (bits + 7) >> 3;
    const uint32_t* words = b.words + (int64_t)row * b.words_room;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    for (int j = threadIdx.x; 4 * j < n; j += BYTE_THREADS) {
        int here = prevented_in_word(words, j, n);
        if (here) atomicAdd(&found, here);
    }
    __syncthreads();
    if (threadIdx.x == 0) b.lengths[row] = n + found;
}

KERNEL(BYTE_THREADS) compact(Batch b) {
    __shared__ int counts[BYTE_THREADS];
    int row = blockIdx.x, me = threadIdx.x, bits = b.bits[row], n = bits < 0 ? 0 : (bits + 7) >> 3;
    const uint32_t* words = b.words + (int64_t)row * b.words_room;
    uint8_t* out = b.out + b.offsets[row];
    if (b.lengths[row] == n) {
        for (int i = me; i < n; i += BYTE_THREADS) out[i] = (uint8_t)byte_at(words, i);
        return;
    }
    int num_words = (n + 3) / 4, each = (num_words + BYTE_THREADS - 1) / BYTE_THREADS;
    int first = min(me * each, num_words), stop = min(first + each, num_words), mine = 0;
    for (int j = first; j < stop; j++) mine += prevented_in_word(words, j, n);
    counts[me] = mine;
    __syncthreads();
    int at = 4 * first;
    for (int j = 0; j < me; j++) at += counts[j];
    for (int i = 4 * first; i < min(4 * stop, n); i++) {
        if (is_prevented(words, i)) out[at++] = 3;
        out[at++] = (uint8_t)byte_at(words, i);
    }
}
