"""Variables that a cluster's profile sets for every process."""

import os
import subprocess
import sys

from tests.test_architecture import ROOT

CODE = """
import os
from nemo_llm.config.load import compose
from nemo_llm.parallel.runtime import start_runtime
start_runtime(compose(["+model=gpt_tiny", "cluster=h100_infiniband", "trainer.accelerator=cpu"]))
print(os.environ["NCCL_IB_HCA"], os.environ["NCCL_IB_TIMEOUT"])
"""


def test_a_profile_sets_what_the_user_has_not_set() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_IB_TIMEOUT": "5"}
    environment.pop("NCCL_IB_HCA", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mlx5", "5"]
