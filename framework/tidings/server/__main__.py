"""`python -m tidings.server`."""

from __future__ import annotations

import sys

from tidings.server.running import main

if __name__ == "__main__":
    sys.exit(main())
