"""nemo_llm: train language models on Megatron-Core, from a laptop CPU to a Slurm cluster.

Importing the package is cheap: neither torch nor Megatron-Core is imported until a run is set up.
"""

import sys

from nemo_llm.environment import require_platform
from nemo_llm.old_names import OldNames

__version__ = "0.1.0"

require_platform()
sys.meta_path.append(OldNames())
