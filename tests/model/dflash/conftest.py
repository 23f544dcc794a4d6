"""Tests of what all methods of blocks have in common use the small drafts of each."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("dspark", "dflash2")]
