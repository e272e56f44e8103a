"""How the golden chunks were made. They are not made again to make a test pass: a reader that
disagrees with them is wrong, or the format has a new version and new files beside these.

    python tests/data/golden/make_golden.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from kvfetcher.codec import uncalibrated
from kvfetcher.codec.base import Profile
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.raw import WithRawCopy
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.calibrations import OnlyPacked, correlated_values, make_calibration
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
# name: geometry, heads per group, tokens, profile, factor on the values (escapes at 20 or 100), sizes,
# first position. The first five were written before units had low bits: today's writer would not
# give them again.
LADDER_CASES = {
    "ladder_8bit": (KVSpec(5, 2, 8), 0, 40, "tiny", 1, (), 0),
    "ladder_10bit_head_groups": (KVSpec(4, 2, 8, dtype="float16"), 1, 33, "balanced", 1, (), 0),
    "ladder_12bit_escapes": (KVSpec(3, 1, 16), 0, 24, "near", 20, (), 0),
    "ladder_mla_fp8": (KVSpec(3, 1, 24, 1, "float8_e4m3fn"), 0, 150, "compact", 1, (), 0),
    "ladder_joined_groups": (KVSpec(5, 2, 8), 1, 36, "balanced", 1, ("144x144",), 0),
    "ladder_low_bits": (KVSpec(5, 2, 8), 1, 37, "near", 1, ("144x144",), 512),
    "ladder_low_bits_escapes": (KVSpec(3, 1, 16, dtype="float16"), 0, 24, "near", 100, (), 2),
    "ladder_packed": (KVSpec(5, 2, 8), 1, 37, "near", 3, ("packed",), 512),
}


UNCALIBRATED_CASES = {
    "uncalibrated_bf16": KVSpec(3, 2, 8),
    "uncalibrated_fp8": KVSpec(2, 1, 12, dtype="float8_e4m3fn"),
}
# name: geometry, tokens, factor on one value of each layer's K and V, first position. At its own
# step the writer never needs 12 bits: so few values lie 128 deviations out that they are escapes.
QUANTISED_CASES = {
    "uncalibrated_8bit": (KVSpec(3, 2, 8), 50, 1, 0),
    "uncalibrated_10bit": (KVSpec(2, 2, 16, dtype="float16"), 64, 1000, 2),
    "uncalibrated_12bit": (KVSpec(2, 2, 8, 1), 40, 20, 512),
}


def ladder_values(
    spec: KVSpec, tokens: int, factor: float, calibration: Calibration, position: int
) -> np.ndarray:
    values = correlated_values(spec, tokens) * np.float32(factor)
    if position:  # the cases at 0 were written without
        rotate_keys(values[:, 0], calibration.rope, position)
    bits = float32_to_bits(values, spec.dtype)
    bits[0, 0, 0, 7, 1] = SPECIALS[spec.dtype][0]  # NaN
    return bits


def quantised_values(spec: KVSpec, tokens: int, factor: int) -> np.ndarray:
    """Finite but for two tokens, so that all others go through the quantiser."""
    values = finite_values(spec, tokens)
    for layer in range(spec.num_layers):
        for k in range(spec.kv_factor):
            values[layer, k, 0, 20, 5] = float32_to_bits(np.float32([factor]), spec.dtype)[0]
    values[0, 0, 1, 9, 3] = SPECIALS[spec.dtype][0]  # NaN
    values[1, -1, 0, 30, 0] = SPECIALS[spec.dtype][3]  # infinity
    return values


def write(
    folder: Path,
    name: str,
    values: np.ndarray,
    spec: KVSpec,
    profile: Profile,
    first_position: int = 0,
) -> bytes:
    data = encode_chunk(
        values,
        spec=spec,
        profile=profile,
        identity=hashlib.sha256(b"identity").digest(),
        chunk_key=hashlib.sha256(name.encode()).digest(),
        parent_key=bytes(32),
        token_ids=range(7, 7 + values.shape[3]),
        first_position=first_position,
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
    for name, (spec, tokens, factor, position) in QUANTISED_CASES.items():
        if name not in expected:
            values = quantised_values(spec, tokens, factor)
            step = 1 / 256 if name == "uncalibrated_12bit" else 1 / 4
            with mock.patch.object(uncalibrated, "_STEP", step):
                data = write(folder, name, values, spec, UncalibratedProfile(), position)
            expected[name] = describe(data)
    for name, (spec, heads, tokens, rung, factor, sizes, position) in LADDER_CASES.items():
        if name not in expected:
            calibration = make_calibration(spec, heads=heads)
            artifact = folder / f"{name}.safetensors"
            calibration.save(artifact)
            if sizes == ("packed",):
                profile = OnlyPacked(rung, calibration)
            else:
                profile = TransformProfile(rung, calibration, frame_sizes=sizes)
            values = ladder_values(spec, tokens, factor, calibration, position)
            data = write(folder, name, values, spec, profile, position)
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
