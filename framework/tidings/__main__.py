"""`python -m tidings`: the command line, where the script `tidings` is not on the PATH.

Internal: nothing imports it.
"""

from __future__ import annotations

from tidings.cli import main

if __name__ == "__main__":
    main()
