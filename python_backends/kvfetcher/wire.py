"""Triton model and tensor names: the one place. config.pbtxt files are tested against it.

Standard library only: the client package imports it too.
"""

from __future__ import annotations

# Models
KVFETCHER = "kvfetcher"
PREPROCESSING = "preprocessing"
KV_FETCH = "kv_fetch"
KV_PIPELINE = "kv_pipeline"
KV_DECODE = "kv_decode"
KV_RESTORE = "kv_restore"
KV_ENCODE = "kv_encode"
KV_SAVE = "kv_save"
TENSORRT_LLM = "tensorrt_llm"
POSTPROCESSING = "postprocessing"
KVFETCHER_OPENAI = "kvfetcher_openai"
OPENAI_INPUT = "openai_input"

# What clients see (names of the TensorRT-LLM ensemble, ours after them)
TEXT_INPUT = "text_input"
MAX_TOKENS = "max_tokens"
STREAM = "stream"
TEMPERATURE = "temperature"
TOP_K = "top_k"
TOP_P = "top_p"
SEED = "seed"
STOP_WORDS = "stop_words"
EXCLUDE_INPUT_IN_OUTPUT = "exclude_input_in_output"
MIN_LENGTH = "min_length"
CACHE_SALT = "cache_salt"
KV_POLICY = "kv_policy"

MESSAGES = "messages"  # STRING [1], JSON list: a chat as OpenAI writes it (preprocessing alone)

TEXT_OUTPUT = "text_output"
OUTPUT_IDS = "output_ids"
FINISH_REASON = "finish_reason"
KV_REPORT = "kv_report"

PROMPT = "prompt"  # STRING [1], what the chat template made of `messages`
NUM_INPUT_TOKENS = "num_input_tokens"  # UINT32 [1]
NUM_OUTPUT_TOKENS = "num_output_tokens"  # UINT32 [1], of this response

# What Triton's OpenAI frontend sends besides; each [1, 1], stop_words [1, n]
FREQUENCY_PENALTY = "frequency_penalty"
PRESENCE_PENALTY = "presence_penalty"
RETURN_NUM_INPUT_TOKENS = "return_num_input_tokens"
RETURN_NUM_OUTPUT_TOKENS = "return_num_output_tokens"
GUIDED_DECODING_GUIDE_TYPE = "guided_decoding_guide_type"
GUIDED_DECODING_GUIDE = "guided_decoding_guide"

KV_POLICIES = ("auto", "fetch", "recompute", "no_store", "warm")

# Between the models
PROMPT_TAG = "prompt_tag"  # STRING [1], of the text that input_ids belong to (backend/tags.py)
SENT_TEXT_INPUT = "sent_text_input"  # STRING [1, 1], what `openai_input` made `text_input` of
CLIENT_OPTIONS = "client_options"  # STRING [1], JSON object: sampling inputs by name
INPUT_IDS = "input_ids"  # INT32 [num_tokens]
SAMPLING = "sampling"  # STRING [1], JSON (backend/params.py), sealed (memory/permits.py)
PERMIT = "permit"  # STRING [1]; what preprocessing gives kv_fetch (memory/permits.py)
STREAM_ID = "stream_id"  # STRING [1]; names a running answer (engines/streams.py)
KV_LEASE = "kv_lease"  # STRING [1], JSON; "" = no lease; to kv_save a sealed SaveTicket

# Codec models
UNIT = "unit"  # UINT8 [num_bytes], one unit (docs/format.md)
UNIT_REST = (
    "unit_rest"  # UINT8 [num_bytes], a unit whose bitstream was decoded (format/unit_rest.py)
)
PLANES = "planes"  # UINT8 [num_frames, num_planes, height, width * bytes_per_sample]
PLANES_AT = "planes_at"  # STRING [1], sealed JSON PlaneTicket; "" = planes holds them
KV_TARGET = "kv_target"  # STRING [1], sealed JSON BlockTarget; "" = return the values
KV_VALUES = "kv_values"  # UINT8 [num_bytes], canonical [L, K, H, T, D], little-endian
DECODE_STATUS = "decode_status"  # STRING [1], JSON: decoder, decode_ms, stamps
KV_STATUS = "kv_status"  # STRING [1], JSON: timings and which decoder
KV_SPEC = "kv_spec"  # STRING [1], JSON: spec of the values, names of the chunk (kv_encode)
CHUNK = "chunk"  # UINT8 [num_bytes], one chunk object (docs/format.md)
