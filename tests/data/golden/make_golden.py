"""How the golden chunks were made. They are not made again to make a test pass: a reader that
disagrees with them is wrong, or the format has a new version and new files beside these.

    python tests/data/golden/make_golden.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.kv_values import finite_values, special_values

TWO = ("160x144", "144x200")
CASES = {
    "exact_bf16": (KVSpec(3, 2, 16), 37, ExactProfile(unit_layers=2)),
    "exact_fp16": (KVSpec(2, 2, 12, dtype="float16"), 33, ExactProfile()),
    "exact_fp8": (KVSpec(2, 1, 17, dtype="float8_e4m3fn"), 21, ExactProfile()),
    "exact_mla": (KVSpec(2, 1, 72, kv_factor=1), 8, ExactProfile(unit_layers=1)),
    "paper_8bit_two_sizes": (KVSpec(4, 2, 16), 90, PaperProfile(TWO, bits=5)),
    "paper_10bit_intra": (KVSpec(2, 2, 8), 20, PaperProfile(TWO[:1], bits=10, inter=False)),
    "paper_12bit": (KVSpec(1, 2, 8, dtype="float16"), 20, PaperProfile(TWO[:1], bits=12)),
}


def main(folder: Path) -> None:
    expected = {}
    for name, (spec, tokens, profile) in CASES.items():
        make = special_values if name.startswith("exact") else finite_values
        data = encode_chunk(
            make(spec, tokens),
            spec=spec,
            profile=profile,
            identity=hashlib.sha256(b"identity").digest(),
            chunk_key=hashlib.sha256(name.encode()).digest(),
            parent_key=bytes(32),
            token_ids=range(7, 7 + tokens),
            first_position=0,
            num_threads=1,
        )
        (folder / f"{name}.kvf").write_bytes(data)
        # The independent reader says what the values are, not the code under test.
        _, values = reference_reader.read_chunk(data)
        expected[name] = {
            "file_sha256": hashlib.sha256(data).hexdigest(),
            "values_sha256": hashlib.sha256(values.tobytes()).hexdigest(),
            "values_shape": values.shape,
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
