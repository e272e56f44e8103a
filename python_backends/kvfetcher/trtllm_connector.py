"""The name by which TensorRT-LLM's configuration loads the KV connector; the code is `engines.connector.entry`."""

import sys

from kvfetcher.engines.connector import entry

# The very module, not a copy of its names: its classes are made when they are first asked for.
sys.modules[__name__] = entry
