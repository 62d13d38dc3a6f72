"""Makes `import maskalign` and `import golden_formula` work from any folder; hides the GPU."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is equal to the bit on CPU is not on a GPU

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "golden")]
