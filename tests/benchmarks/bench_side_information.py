"""What token ids, which both ends have, would save: coefficients predicted from token embeddings.

    python tests/benchmarks/bench_side_information.py > tests/benchmarks/results/side_information_NAME.json

A ridge regression from the normalised input embedding of a token to its coefficients is fitted on
calibration texts; on other texts the integers of the coefficients and of what the prediction leaves
are counted by order-0 entropy (classes of 32 rows, rows sorted by the spread of what is coded). The
quantiser is the same, so is the noise. Layer 0 before attention is linear in that embedding, so this
also bounds what computing layer 0 anew would save.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from kvfetcher.bench.baselines import order0_bits
from kvfetcher.calibration.calibrate import SINK_TOKENS
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.texts import default_texts, load_texts
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.groups import to_vectors
from kvfetcher.codec.ladder.library import model_calibration_path
from kvfetcher.codec.ladder.rope import unrotate_keys
from kvfetcher.models.folders import prepare_model
from kvfetcher.models.identity import weights_digest

RIDGE = 1e-2  # of the mean diagonal


def embeddings(model, ids):
    """[T, k] input embeddings scaled to unit root mean square, and a constant."""
    with torch.no_grad():
        e = model.model.get_input_embeddings()(torch.tensor(ids)).float().numpy()
    e = e / np.sqrt((e**2).mean(axis=1, keepdims=True) + 1e-12)
    return np.concatenate([e, np.ones((len(e), 1), np.float32)], axis=1)


def coefficients(model, calibration, ids, profile):
    """Of each layer group [T, rank] in steps, without the first tokens."""
    values = model.prefill(ids).to_array()
    unrotate_keys(values[:, 0], calibration.rope, 0)
    values = np.ascontiguousarray(values[:, :, :, SINK_TOKENS:])
    grouping, step = calibration.grouping, calibration.steps[profile]
    found = []
    for group, (start, count) in enumerate(
        zip(grouping.layer_starts, grouping.layer_counts, strict=True)
    ):
        matrices = calibration.matrices((group, 0), calibration.unit_rank(group, profile))
        vectors = to_vectors(values[start : start + count], grouping.head_ranges[0])
        found.append((vectors - matrices.mean) @ matrices.forward.T / np.float32(step))
    return found


def entropy(coded):
    """Bits of integers [T, rank], rows sorted by spread."""
    integers = np.rint(coded).astype(np.int64).T
    integers = integers[np.argsort(-integers.std(axis=1))]
    return order0_bits(integers - integers.min(), rows_per_class=32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent / "texts")
    parser.add_argument("--profile", default="balanced")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    folder = prepare_model(args.model).path
    calibration = Calibration.load(
        args.calibration or model_calibration_path(weights_digest(folder))
    )
    model = CaptureModel.load(folder)
    groups = len(calibration.grouping.layer_counts)
    gram, cross, fitted = None, [None] * groups, 0
    for text in default_texts():
        ids = model.encode(text.text)[: args.tokens]
        if len(ids) < args.tokens:
            continue
        e = embeddings(model, ids)[SINK_TOKENS:]
        gram = e.T @ e + (0 if gram is None else gram)
        for g, z in enumerate(coefficients(model, calibration, ids, args.profile)):
            cross[g] = e.T @ z + (0 if cross[g] is None else cross[g])
        fitted += 1
        sys.stderr.write(f"fitted on {text.name} ({fitted} of {args.documents})\n")
        if fitted == args.documents:
            break
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
    maps = [np.linalg.solve(gram + ridge, c) for c in cross]
    plain, predicted, elements = np.zeros(groups), np.zeros(groups), np.zeros(groups)
    names = []
    for text in load_texts(args.texts):
        ids = model.encode(text.text)[: args.tokens]
        e = embeddings(model, ids)[SINK_TOKENS:]
        for g, z in enumerate(coefficients(model, calibration, ids, args.profile)):
            plain[g] += entropy(z)
            predicted[g] += entropy(z - e @ maps[g])
            elements[g] += len(z) * calibration.grouping.dimension(g, 0)
        names.append(text.name)
        sys.stderr.write(f"measured {text.name}: {predicted.sum() / plain.sum():.4f}\n")
    ranks = [m.shape[1] for m in maps]
    width = len(gram)
    report = {
        "command": "python tests/benchmarks/bench_side_information.py " + " ".join(sys.argv[1:]),
        "model": args.model,
        "calibration": calibration.digest,
        "profile": args.profile,
        "fitted_tokens": fitted * (args.tokens - SINK_TOKENS),
        "documents": names,
        "groups": [
            {
                "layers": calibration.grouping.layer_counts[g],
                "entropy_bits_per_element": round(float(plain[g] / elements[g]), 4),
                "with_prediction": round(float(predicted[g] / elements[g]), 4),
            }
            for g in range(groups)
        ],
        "saved": round(float(1 - predicted.sum() / plain.sum()), 4),
        "matrix_bytes_float16": 2 * width * sum(ranks),
        "multiply_adds_per_element": round(
            width * sum(ranks) / calibration.spec.elements_per_token, 1
        ),
        "restore_multiply_adds_per_element": round(
            sum(r * calibration.grouping.dimension(g, 0) for g, r in enumerate(ranks))
            / calibration.spec.elements_per_token,
            1,
        ),
        "embedding_table_bytes_float16": 2 * model.vocabulary_size * (width - 1),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
