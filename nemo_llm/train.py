"""Train a language model: ``python -m nemo_llm.train +model=gpt_tiny``.

Everything heavy is imported inside the functions, so that ``--help`` and configuration errors answer at once.
"""

import sys
from typing import TYPE_CHECKING

from nemo_llm.config import RunConfig
from nemo_llm.config.commands.entry import intended_world_size, run_entry_point
from nemo_llm.errors import ExitCode
from nemo_llm.log import configure_logging, get_logger

if TYPE_CHECKING:
    from nemo_llm.parallel.runtime import ParallelRuntime


def main(cfg: RunConfig) -> ExitCode:
    """Build the run, resume it if there is something to resume, train, and show what came of it."""
    configure_logging()
    if cfg.trainer.check_only:
        return check_only(cfg)

    from nemo_llm.parallel.runtime import own_runtime

    with own_runtime(cfg.runtime_setting) as runtime:
        from nemo_llm.training.lifecycle import close_run, open_run
        from nemo_llm.training.loop import train
        from nemo_llm.training.resume import resume
        from nemo_llm.training.setup import build_training_run

        check_memory(cfg, runtime)
        run = build_training_run(cfg, runtime)
        with open_run(run):
            resume(run)
            ending = train(run)
            close_run(run, ending)
    return ending.code


def check_only(cfg: RunConfig) -> ExitCode:
    """Print what the run would read, its plan and whether it fits; starts nothing."""
    from nemo_llm.config.sections.batch_ramp import build_batch_ramp
    from nemo_llm.data.build import describe_data
    from nemo_llm.tokenizers.tokenizer import load_tokenizer
    from nemo_llm.training.check_only import report

    tokenizer = load_tokenizer(cfg.data.tokenizer)
    ramp = build_batch_ramp(cfg.trainer.global_batch_size, cfg.trainer.rampup_batch_size)
    print(
        describe_data(cfg.data, cfg.model_setting, tokenizer, ramp.consumed_samples(cfg.trainer.max_steps)), end="\n\n"
    )
    print(report(cfg, intended_world_size(cfg), tokenizer.vocab_size))
    return ExitCode.DONE


def check_memory(cfg: RunConfig, runtime: "ParallelRuntime") -> None:
    """Refuse a run that its GPU cannot hold, before anything is built; on a CPU nothing is compared.

    Raises:
        ConfigError: the run needs more memory than this rank's GPU has.
    """
    if runtime.device.type != "cuda":
        return
    import torch

    from nemo_llm.planner.memory import GIB
    from nemo_llm.tokenizers.tokenizer import load_tokenizer
    from nemo_llm.training.check_only import check_card

    card = torch.cuda.get_device_properties(runtime.device)
    vocab_size = cfg.model.vocab_size or load_tokenizer(cfg.data.tokenizer).vocab_size
    warning = check_card(cfg, runtime.world_size, vocab_size, (card.name, card.total_memory / GIB))
    if warning is not None:
        get_logger(__name__).warning("memory: %s", warning)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
