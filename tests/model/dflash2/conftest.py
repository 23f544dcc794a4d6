"""DFlash2's tests use the small drafts of DFlash's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dflash"))
