"""The certificate: what a calibration costs on held-out texts, through the real codec.

Every profile of the ladder codes the caches of texts that the calibration has not seen, H.265 and
side data included; quality is that of `quality.compare`, with the reference in float32.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher import __version__
from kvfetcher.calibration.journal import Journal
from kvfetcher.calibration.quality import Document, measure, prepare
from kvfetcher.calibration.texts import Text, texts_digest
from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.profiles import encode_unnamed, restore_unit
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ConfigError
from kvfetcher.format.container import parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.calibration.capture import CaptureModel
    from kvfetcher.calibration.progress import Progress
    from kvfetcher.codec.base import Profile
    from kvfetcher.codec.ladder.artifact import Calibration
    from kvfetcher.spec import KVSpec

CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class CertifySettings:
    """How much is measured: per document a prefix that is coded, and what follows it."""

    num_documents: int = 5
    prefix_tokens: int = 2048
    following_tokens: int = 512


def code_cache(
    values: NDArray[np.float32],
    *,
    spec: KVSpec,
    profile: Profile,
    decoder: VideoDecoder,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[NDArray[np.float32], float]:
    """Code a cache chunk by chunk as a server does, and restore it.

    Args:
        values: [L, K, H, T, D] from position 0, keys rotated.
        spec: geometry and KV dtype.
        profile: how.
        decoder: decoder of the video.
        chunk_tokens: tokens of one chunk.

    Returns:
        The restored cache, and the bits of all chunk objects with headers and tables.
    """
    restored = np.empty_like(values)
    num_bytes = 0
    encoder = choose_encoder("auto").encode
    for start in range(0, values.shape[3], chunk_tokens):
        bits = float32_to_bits(
            np.ascontiguousarray(values[:, :, :, start : start + chunk_tokens]), spec.dtype
        )
        chunk = encode_unnamed(
            bits,
            spec=spec,
            profile=profile,
            first_position=start,
            num_threads=1,
            encoder=encoder,
        )
        header = parse_header(chunk)
        num_bytes += len(chunk)
        for entry in header.units:
            if entry.variant != header.units[0].variant:
                continue
            data = chunk[entry.offset : entry.stop]
            unit = parse_unit(data)
            out = restore_unit(data, decoder.decode(unit.packets(), unit.geometry))
            stop = entry.layer_start + entry.num_layers
            restored[entry.layer_start : stop, :, :, start : start + chunk_tokens] = (
                bits_to_float32(out.values, spec.dtype)
            )
    return restored, 8.0 * num_bytes


def held_out_documents(
    model: CaptureModel,
    texts: list[Text],
    settings: CertifySettings,
    *,
    progress: Progress,
) -> list[Document]:
    """The first texts that are long enough, prefilled.

    Raises:
        ConfigError: none is.
    """
    documents: list[Document] = []
    for text in texts:
        document = prepare(
            model,
            text,
            prefix_tokens=settings.prefix_tokens,
            following_tokens=settings.following_tokens,
        )
        if document is not None:
            documents.append(document)
            progress(f"prefilled {text.name}", len(documents), settings.num_documents)
        if len(documents) == settings.num_documents:
            break
    if not documents:
        raise ConfigError(
            f"no held-out text has {settings.prefix_tokens + settings.following_tokens} tokens;"
            " give longer texts"
        )
    return documents


def certify(
    model: CaptureModel,
    calibration: Calibration,
    texts: list[Text],
    documents: list[Document],
    *,
    journal: Journal | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure a calibration.

    Args:
        model: the model that it was made for.
        calibration: what to measure.
        texts: what ``documents`` were taken from; only for their digest.
        documents: held-out texts, prefilled.
        journal: journal of the profiles' figures.
        progress: called after every profile.

    Returns:
        The certificate: per profile bits per element, ratio against the KV dtype, KL mean and
        worst, perplexity change, top-1 agreement; and on what it was measured.
    """
    register_calibration(calibration)
    spec, decoder = calibration.spec, VideoDecoder()
    journal = journal or Journal()
    profiles: dict[str, Any] = {}

    def row(name: str) -> dict[str, Any]:
        coder = functools.partial(
            code_cache, spec=spec, profile=TransformProfile(name, calibration), decoder=decoder
        )
        found = measure(model, documents, coder)
        return {
            "step": calibration.steps[name],
            "bits_per_element": round(found.bits_per_element, 4),
            "ratio": round(8 * spec.item_bytes / found.bits_per_element, 3),
            "worst_kl": found.worst_kl,
            **asdict(found.quality),
        }

    for name in LADDER:
        profiles[name] = journal.measured(
            f"{name} of {calibration.digest}", functools.partial(row, name)
        )
        progress(f"measured {name}: KL {profiles[name]['kl']:.2e}", len(profiles), len(LADDER))
    decoder.close()
    return {
        "calibration": calibration.digest,
        "dtype": spec.dtype,
        "profiles": profiles,
        "documents": [document.name for document in documents],
        "texts": texts_digest(texts),
        "prefix_tokens": len(documents[0].ids),
        "following_tokens": len(documents[0].following),
        "chunk_tokens": CHUNK_TOKENS,
        "kvfetcher": __version__,
        "machine": platform.machine(),
    }
