#!/usr/bin/env bash
# FFmpeg: `max_pixels` set to a picture's own size refuses that picture, with "Cannot allocate memory".
#
# Expected: a decoder with max_pixels=144*200 decodes a picture of 144x200, and refuses a larger one with
# an error that says so.
# Observed: FFmpeg counts the rows with the padding of its frame buffer, so that the smallest limit that
# works here is 192*200. Below it the error is ENOMEM, which PyAV raises as MemoryError.
#
# Here: kvfetcher/codec/video.py rounds both sides of its limit up to 64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install av==18.1.0 numpy==1.26.4
"$folder/venv/bin/python" <<'PY'
import sys
from fractions import Fraction
import av
import numpy as np

WIDTH, HEIGHT = 144, 200
encoder = av.CodecContext.create("libx265", "w")
encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv444p"
encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
encoder.options = {"x265-params": "lossless=1:log-level=none"}
frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p")
for plane in frame.planes:
    np.frombuffer(plane, np.uint8)[:] = 128
packets = [bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)]]

def decode(limit):
    decoder = av.CodecContext.create("hevc", "r")
    decoder.options = {"max_pixels": str(limit)}
    try:
        (back,) = [f for p in [*packets, None] for f in decoder.decode(p and av.Packet(p))]
        return f"decodes to {back.width}x{back.height}"
    except (MemoryError, av.FFmpegError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}"

own = decode(WIDTH * HEIGHT)
low, high = WIDTH * HEIGHT, 4 * WIDTH * HEIGHT
while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if decode(middle).startswith("decodes") else (middle + 1, high)
print(f"a picture of {WIDTH}x{HEIGHT} with max_pixels={WIDTH}*{HEIGHT}: {own}")
print(f"the smallest limit with which it decodes is {low} = {low // HEIGHT}*{HEIGHT}")
sys.exit(not (own.startswith("MemoryError") and low > WIDTH * HEIGHT))
PY
echo "as described"
