"""What every engine checks of a request before it runs: its rules, and the lease it brings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.errors import LeaseError, RequestError
from kvfetcher.memory.leases import tokens_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.engines.base import GenerateRequest
    from kvfetcher.engines.detokenize import Decodes
    from kvfetcher.memory.leases import Lease, LeaseTable

_log = logging.getLogger(__name__)


class StopRules(NamedTuple):
    """What ends an answer before its length."""

    ids: tuple[int, ...]
    """Tokens: those of the model, and stop words that are a token of their own."""
    words: tuple[str, ...]
    """Texts to look for."""


def check_request(
    request: GenerateRequest,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    max_output_tokens: int,
    max_positions: int,
) -> int:
    """Check a request against the model's and the configuration's limits.

    Returns:
        How many tokens may be generated.

    Raises:
        RequestError: a rule is broken.
    """
    ids = request.input_ids
    if not ids:
        raise RequestError("the prompt has no tokens; send at least one")
    if len(ids) > max_prompt_tokens:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, at most {max_prompt_tokens} are possible"
            " (the model's positions, engine.max_prompt_tokens); shorten it"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RequestError(f"token ids must be 0 to {vocab_size - 1}, got {min(ids)} to {max(ids)}")
    if request.sampling.max_tokens > max_output_tokens:
        raise RequestError(
            f"max_tokens must be at most {max_output_tokens} (engine.max_output_tokens), got"
            f" {request.sampling.max_tokens}"
        )
    return min(request.sampling.max_tokens, max_positions - len(ids))


def stop_rules(
    tokenizer: Decodes, *, eos_ids: tuple[int, ...], stop_words: Sequence[str]
) -> StopRules:
    """Stop words that name a token of the tokenizer's list stop by its id.

    The text of an answer has no special tokens, so that looking for such a word in it would never
    find one.

    Args:
        tokenizer: transformers' tokenizer.
        eos_ids: end-of-sequence ids of the model.
        stop_words: of a request.

    Raises:
        RequestError: a stop word mixes a special token with other text.
    """
    added = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    ids, words = list(eos_ids), []
    for word in stop_words:
        if word in added:
            ids.append(added[word])
        elif held := next((token for token in sorted(special) if token and token in word), None):
            raise RequestError(
                f"stop word {word!r} holds the special token {held!r} beside other text, which no"
                " answer's text does; give the token alone"
            )
        else:
            words.append(word)
    return StopRules(tuple(dict.fromkeys(ids)), tuple(words))


def claim_lease(
    request: GenerateRequest, *, generation: str, leases: LeaseTable, now: float
) -> tuple[Lease | None, str]:
    """Claim the request's lease for reading.

    Args:
        request: perhaps with a lease.
        generation: generation of the arena.
        leases: over its blocks.
        now: seconds.

    Returns:
        The claimed lease, or None and why. A lease that cannot be used is a miss, not a failure.
    """
    claim = request.lease
    if claim is None:
        return None, ""
    try:
        if claim.generation != generation:
            raise LeaseError(f"lease {claim.lease_id} is of another run of the engine")
        lease = leases.claim(claim.lease_id, now=now)
    except LeaseError as exc:
        _log.warning("request %s: computing everything: %s", request.request_id, exc)
        return None, str(exc)
    held = request.input_ids[: lease.num_tokens]
    if (
        lease.num_tokens != claim.num_tokens
        or len(held) != lease.num_tokens
        or tokens_digest(held) != lease.tokens_digest
    ):
        leases.release(lease.id, now=now, is_claimer=True)
        reason = f"lease {lease.id} holds the KV of other tokens than this prompt begins with"
        _log.error("request %s: computing everything: %s", request.request_id, reason)
        return None, reason
    return lease, ""
