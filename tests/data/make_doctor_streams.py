"""Makes the golden streams of `kvfetcher doctor` (python_backends/kvfetcher/doctor/golden).

Run once; the files are never made again to let a test pass. Made with PyAV 18.1.0.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.doctor.streams import planes_sha256
from kvfetcher.format.pictures import BIT_DEPTHS, PlaneGeometry

FOLDER = Path(__file__).parents[2] / "python_backends" / "kvfetcher" / "doctor" / "golden"


def main():
    facts = {}
    for chroma in ("4:2:0", "4:4:4"):
        for depth in BIT_DEPTHS:
            geometry = PlaneGeometry(2, 160, 144, depth, chroma)
            rng = np.random.default_rng([depth, geometry.num_planes])
            values = np.rint(rng.normal(1 << (depth - 1), 0.45, geometry.shape))
            strewn = values[:, :, ::11, ::7]
            strewn[...] = rng.integers(0, 1 << depth, strewn.shape)
            planes = values.astype(geometry.dtype)
            packets = encode_planes(planes, bit_depth=depth, chroma=chroma, gop=2)
            assert np.array_equal(VideoDecoder().decode(packets, geometry), planes)
            name = f"{chroma.replace(':', '')}_{depth}bit"
            (FOLDER / f"{name}.h265").write_bytes(b"".join(packets))
            facts[name] = {
                "geometry": asdict(geometry),
                "packet_bytes": [len(packet) for packet in packets],
                "sha256": planes_sha256(planes),
            }
    (FOLDER / "streams.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
