"""Draw pages again from their stored JSON: all of them, or those that are named."""

import sys
from pathlib import Path

# a folder that is run has itself as the first entry: the scripts' folder takes its place
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pages.render import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
