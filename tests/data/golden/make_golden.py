"""How the golden chunks were made. They are not made again to make a test pass: a reader that
disagrees with them is wrong, or the format has a new version and new files beside these.

    python tests/data/golden/make_golden.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from kvfetcher.codec.base import Profile
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.raw import WithRawCopy
from kvfetcher.codec.transform import TransformProfile
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.quant import float32_to_bits
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.calibrations import correlated_values, make_calibration
from support.kv_values import SPECIALS, finite_values, special_values

TWO = ("160x144", "144x200")
CASES = {
    "exact_bf16": (KVSpec(3, 2, 16), 37, ExactProfile(unit_layers=2)),
    "exact_fp16": (KVSpec(2, 2, 12, dtype="float16"), 33, ExactProfile()),
    "exact_fp8": (KVSpec(2, 1, 17, dtype="float8_e4m3fn"), 21, ExactProfile()),
    "exact_raw_copy": (KVSpec(2, 1, 16), 19, WithRawCopy(ExactProfile())),
    "exact_mla": (KVSpec(2, 1, 72, kv_factor=1), 8, ExactProfile(unit_layers=1)),
    "paper_8bit_two_sizes": (KVSpec(4, 2, 16), 90, PaperProfile(TWO, bits=5)),
    "paper_10bit_intra": (KVSpec(2, 2, 8), 20, PaperProfile(TWO[:1], bits=10, inter=False)),
    "paper_12bit": (KVSpec(1, 2, 8, dtype="float16"), 20, PaperProfile(TWO[:1], bits=12)),
}


# Restored through floats: their integers are pinned, their values to one unit in the last place.
# name: geometry, heads per group, tokens, profile, factor on the values (escapes at 20), sizes
LADDER_CASES = {
    "ladder_8bit": (KVSpec(5, 2, 8), 0, 40, "tiny", 1, ()),
    "ladder_10bit_head_groups": (KVSpec(4, 2, 8, dtype="float16"), 1, 33, "balanced", 1, ()),
    "ladder_12bit_escapes": (KVSpec(3, 1, 16), 0, 24, "near", 20, ()),
    "ladder_mla_fp8": (KVSpec(3, 1, 24, 1, "float8_e4m3fn"), 0, 150, "compact", 1, ()),
    "ladder_joined_groups": (KVSpec(5, 2, 8), 1, 36, "balanced", 1, ("144x144",)),
}
UNCALIBRATED_CASES = {
    "uncalibrated_bf16": KVSpec(3, 2, 8),
    "uncalibrated_fp8": KVSpec(2, 1, 12, dtype="float8_e4m3fn"),
}


def ladder_values(spec: KVSpec, tokens: int, factor: float) -> np.ndarray:
    values = correlated_values(spec, tokens) * np.float32(factor)
    bits = float32_to_bits(values, spec.dtype)
    bits[0, 0, 0, 7, 1] = SPECIALS[spec.dtype][0]  # NaN
    return bits


def write(folder: Path, name: str, values: np.ndarray, spec: KVSpec, profile: Profile) -> bytes:
    data = encode_chunk(
        values,
        spec=spec,
        profile=profile,
        identity=hashlib.sha256(b"identity").digest(),
        chunk_key=hashlib.sha256(name.encode()).digest(),
        parent_key=bytes(32),
        token_ids=range(7, 7 + values.shape[3]),
        first_position=0,
        num_threads=1,
    )
    (folder / f"{name}.kvf").write_bytes(data)
    return data


def main(folder: Path) -> None:
    """Add what is missing; nothing that is there is touched."""
    path = folder / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    for name, (spec, tokens, profile) in CASES.items():
        make = special_values if name.startswith("exact") else finite_values
        if name not in expected:
            data = write(folder, name, make(spec, tokens), spec, profile)
            expected[name] = describe(data)
    for name, spec in UNCALIBRATED_CASES.items():
        if name not in expected:
            data = write(folder, name, special_values(spec, 50), spec, UncalibratedProfile())
            expected[name] = describe(data)
    for name, (spec, heads, tokens, rung, factor, sizes) in LADDER_CASES.items():
        if name not in expected:
            calibration = make_calibration(spec, heads=heads)
            artifact = folder / f"{name}.safetensors"
            calibration.save(artifact)
            profile = TransformProfile(rung, calibration, frame_sizes=sizes)
            data = write(folder, name, ladder_values(spec, tokens, factor), spec, profile)
            _, values = reference_reader.read_chunk(data, artifact=artifact)
            (folder / f"{name}.values").write_bytes(values.tobytes())
            expected[name] = {**describe(data, artifact), "artifact": calibration.digest}
    path.write_text(json.dumps(expected, indent=1) + "\n")


def describe(data: bytes, artifact: Path | None = None) -> dict[str, object]:
    # The independent reader says what the values are, not the code under test.
    _, values = reference_reader.read_chunk(data, artifact=artifact)
    return {
        "file_sha256": hashlib.sha256(data).hexdigest(),
        "values_sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "values_shape": values.shape,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
