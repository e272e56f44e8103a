"""``python -m kvfetcher_client`` is ``kvfetcher generate``."""

import sys

from kvfetcher_client.cli import main

sys.exit(main())
