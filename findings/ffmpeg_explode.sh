#!/usr/bin/env bash
# FFmpeg: `err_detect=explode` with every check on does not notice damage in an HEVC slice.
#
# Expected: with err_detect=crccheck+bitstream+buffer+explode, a flipped bit in the picture's data is an
# error, or at least most flipped bits are.
# Observed: nearly all flipped bits give a picture with wrong samples and no error. A lossless stream
# alone proves nothing about what came back.
#
# Here: every unit carries a CRC-32 of its bitstream and a digest of its samples (docs/format.md).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install av==18.1.0 numpy==1.26.4
"$folder/venv/bin/python" <<'PY'
import sys
from collections import Counter
from fractions import Fraction
import av
import numpy as np

SIDE, ROUNDS = 256, 200
rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
encoder = av.CodecContext.create("libx265", "w")
encoder.width = encoder.height = SIDE
encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv444p", Fraction(1, 25), Fraction(25)
encoder.options = {"preset": "ultrafast", "x265-params": "lossless=1:info=0:log-level=none"}
frame = av.VideoFrame(SIDE, SIDE, "yuv444p")
for plane, samples in zip(frame.planes, picture):
    np.frombuffer(plane, np.uint8).reshape(SIDE, -1)[:, :SIDE] = samples
stream = b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))

def decode(data):
    decoder = av.CodecContext.create("hevc", "r")
    decoder.thread_count = 1
    decoder.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    try:
        frames = [f for p in (av.Packet(data), None) for f in decoder.decode(p)]
    except (av.FFmpegError, ValueError):
        return "error"
    if len(frames) != 1:
        return "error"
    planes = [np.frombuffer(p, np.uint8).reshape(SIDE, -1)[:, :SIDE] for p in frames[0].planes]
    return "right picture" if np.array_equal(np.stack(planes), picture) else "wrong picture, no error"

assert decode(stream) == "right picture"
results = Counter()
for _ in range(ROUNDS):
    damaged = bytearray(stream)
    damaged[rng.integers(len(stream) // 10, len(stream))] ^= 1 << int(rng.integers(8))
    results[decode(bytes(damaged))] += 1
print(f"one flipped bit in the last nine tenths of a stream, {ROUNDS} times:", dict(results))
sys.exit(not results["wrong picture, no error"] > 0.8 * ROUNDS)
PY
echo "as described"
