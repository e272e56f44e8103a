"""Write the streams of tests/data/golden/hevc. Only for a new structure; see PROVENANCE.md.

python tests/data/golden/make_hevc.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvfetcher.codec.hevc.encoder import encode_planes
from support.hevc_pictures import GOLDEN, golden_picture

for name in GOLDEN:
    geometry, planes = golden_picture(name)
    (stream,) = encode_planes(planes, bit_depth=geometry.bit_depth, chroma=geometry.chroma)
    (Path(__file__).parent / "hevc" / f"{name}.hevc").write_bytes(stream)
