"""What the fork server imports once for all ranks."""

import warnings

warnings.filterwarnings("ignore")

import nemo_llm.training.setup  # noqa: E402, F401
