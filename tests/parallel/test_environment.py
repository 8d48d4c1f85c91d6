"""Variables that a cluster's profile sets for every process."""

import os
import subprocess
import sys

from tests.test_architecture import ROOT

CODE = """
import os
from nemo_llm.config.compose.load import compose
from nemo_llm.parallel.runtime import start_runtime
start_runtime(compose(["+model=gpt_tiny", "cluster=h100_infiniband", "trainer.accelerator=cpu"]).runtime_setting)
print(os.environ["NCCL_IB_HCA"], os.environ["NCCL_IB_TIMEOUT"], os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""


def _variables(**set_by_user: str) -> list[str]:
    ours = ("NCCL_IB_HCA", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT), "NCCL_IB_TIMEOUT": "5", **set_by_user}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_profile_sets_what_the_user_has_not_set() -> None:
    assert _variables()[:2] == ["mlx5", "5"]


def test_the_allocator_is_the_users_under_either_name() -> None:
    assert _variables()[2] == "expandable_segments:True"
    assert _variables(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")[2] == "max_split_size_mb:64"
    assert _variables(PYTORCH_ALLOC_CONF="max_split_size_mb:64")[2] == "None"
