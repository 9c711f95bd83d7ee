"""`python -m tidings.server`: the command `tidings server` by another name. It has no options of its own."""

from __future__ import annotations

import sys

from tidings.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "server")
    main()
