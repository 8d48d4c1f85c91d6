"""What is optimised: one class for each ``task.name``. Adding one: docs/develop/add-a-task.md."""

from nemo_llm.config.sections.task import TaskConfig
from nemo_llm.tasks.base import Task
from nemo_llm.tasks.classification import Classification
from nemo_llm.tasks.pretrain import Pretrain
from nemo_llm.tasks.score import Score
from nemo_llm.tasks.sft import Sft

TASKS: dict[str, type[Task]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "classification": Classification,
    "score": Score,
}


def build_task(section: TaskConfig) -> Task:
    """The task of ``cfg.task``."""
    return TASKS[section.name](section)
