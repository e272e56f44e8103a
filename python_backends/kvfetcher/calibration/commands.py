"""`kvfetcher calibrate` and `kvfetcher certify`: arguments in, an artifact and its figures out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.calibration.calibrate import (
    CalibrateSettings,
    CollectSettings,
    calibrate,
    journal_path,
    recertify,
)
from kvfetcher.calibration.certify import CertifySettings
from kvfetcher.calibration.texts import Text, default_texts, keep_apart, load_texts
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.bar import below_bar
from kvfetcher.codec.ladder.library import (
    calibration_folder,
    model_calibration_path,
    store_calibration,
)
from kvfetcher.errors import ConfigError, KVFetcherError
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.calibration.progress import Progress


def calibrate_parser() -> argparse.ArgumentParser:
    """The command line of `kvfetcher calibrate`."""
    defaults, amounts = CalibrateSettings(), CollectSettings()
    parser = argparse.ArgumentParser(
        prog="kvfetcher calibrate", description="Make the calibration artifact of a model."
    )
    parser.add_argument("model", help="a built-in model's name, or a Hugging Face model folder")
    parser.add_argument(
        "--texts",
        type=Path,
        help="folder of texts, a fifth of which is held out (default: texts of this machine)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=amounts.num_documents,
        help="number of documents (default: %(default)s)",
    )
    parser.add_argument(
        "--layers-per-group",
        type=int,
        default=defaults.layers_per_group,
        help="number of neighbouring layers of one transform; 0 = chosen by the model's shape",
    )
    parser.add_argument(
        "--heads-per-group",
        type=int,
        default=defaults.heads_per_group,
        help="number of KV heads of one transform; 0 = all",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("bfloat16", "float16", "float8_e4m3fn"),
        default=defaults.dtype,
        help="type of the KV values (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=amounts.seed, help="of random choices (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the calibration to this file")
    return parser


def main_calibrate(argv: Sequence[str] | None = None) -> int:
    """Run `kvfetcher calibrate`: the certificate as JSON on stdout. Returns the exit status."""
    args = calibrate_parser().parse_args(argv)
    try:
        calibration = _calibrate(args)
    except KVFetcherError as exc:
        sys.stderr.write(f"kvfetcher calibrate: {exc}\n")
        return 1
    _print_certificate(calibration)
    return 0


def certify_parser() -> argparse.ArgumentParser:
    """The command line of `kvfetcher certify`."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher certify", description="Measure an existing calibration again."
    )
    parser.add_argument("model", help="a built-in model's name, or a Hugging Face model folder")
    parser.add_argument(
        "--calibration", type=Path, help="calibration file (default: the one kept for the model)"
    )
    parser.add_argument("--texts", type=Path, help="folder of held-out texts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: %(default)s)")
    return parser


def main_certify(argv: Sequence[str] | None = None) -> int:
    """Run `kvfetcher certify`: the certificate as JSON on stdout. Returns the exit status."""
    args = certify_parser().parse_args(argv)
    try:
        folder, digest = _model(args.model)
        path = args.calibration or model_calibration_path(digest)
        calibration = recertify(
            folder,
            Calibration.load(path),
            held_out=load_texts(args.texts) if args.texts else default_texts(held_out=True),
            settings=CertifySettings(),
            device=args.device,
            progress=_progress(),
        )
        if args.calibration is not None:
            calibration.save(path)
        else:
            store_calibration(calibration)
    except KVFetcherError as exc:
        sys.stderr.write(f"kvfetcher certify: {exc}\n")
        return 1
    _print_certificate(calibration)
    return 0


def split_texts(texts: list[Text]) -> tuple[list[Text], list[Text]]:
    """(to calibrate with, held out): every fifth file is held out, of fewer than five the last.

    Files that repeat what is held out are in neither.

    Raises:
        ConfigError: nothing is left to calibrate with.
    """
    files = list(dict.fromkeys(text.file for text in texts))
    chosen = set(files[4::5] or files[-1:])
    held_out = [text for text in texts if text.file in chosen]
    kept = keep_apart([text for text in texts if text.file not in chosen], held_out)
    if not kept:
        raise ConfigError(
            f"of {len(files)} files of texts, {len(chosen)} are held out to certify with, and no"
            " other is left that does not repeat them; give more files, five or more of different"
            " content"
        )
    return kept, held_out


def _calibrate(args: argparse.Namespace) -> Calibration:
    folder, digest = _model(args.model)
    if args.texts is not None:
        texts, held_out = split_texts(load_texts(args.texts))
    else:
        texts, held_out = default_texts(), default_texts(held_out=True)
    scratch = calibration_folder()
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = scratch / f"unfinished-{digest[:16]}.npz"
    calibration = calibrate(
        folder,
        texts=texts,
        held_out=held_out,
        settings=CalibrateSettings(
            layers_per_group=args.layers_per_group,
            heads_per_group=args.heads_per_group,
            dtype=args.kv_dtype,
            collect=CollectSettings(num_documents=args.documents, seed=args.seed),
        ),
        checkpoint=checkpoint,
        device=args.device,
        progress=_progress(),
    )
    path = store_calibration(calibration)
    checkpoint.unlink(missing_ok=True)
    journal_path(checkpoint).unlink(missing_ok=True)
    sys.stderr.write(f"kept as {path}\n")
    if args.output is not None:
        calibration.save(args.output)
    return calibration


def _model(name: str) -> tuple[Path, str]:
    from kvfetcher.models.folders import prepare_model
    from kvfetcher.models.identity import weights_digest

    folder = prepare_model(name, progress=_tell).path
    return folder, weights_digest(folder)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _progress() -> Progress:
    started = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        of = f"{done} of {total}" if total else str(done)
        sys.stderr.write(f"[{time.monotonic() - started:6.0f} s] {what} ({of})\n")

    return say


def _print_certificate(calibration: Calibration) -> None:
    certificate = dict(calibration.certificate or {})
    for name in LADDER:
        row = certificate["profiles"][name]
        sys.stderr.write(
            f"{name:9} {row['bits_per_element']:6.3f} bits per element, {row['ratio']:5.2f} times"
            f" smaller, KL {row['kl']:.1e} (worst text {row['worst_kl']:.1e}), perplexity"
            f" {100 * row['perplexity_change']:+.2f} %, top-1 {100 * row['top1_agreement']:.1f} %\n"
        )
    for name in LADDER:
        if why := below_bar(certificate, name):
            effect = "; `auto` stays exact" if name == "balanced" else ""
            sys.stderr.write(f"kvfetcher: warning: {why}{effect}\n")
    sys.stdout.write(json.dumps(certificate, indent=1) + "\n")
