"""Measure trained models: ``python -m nemo_llm.evaluate checkpoint=runs/mine texts=held_out.txt``.

All keys with their defaults: conf/evaluate.yaml.
"""

import sys
from pathlib import Path

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.evaluate import EvaluateConfig
from nemo_llm.log import is_first_rank, launched_world_size


def main(cfg: EvaluateConfig) -> None:
    """Measure every checkpoint that is named, print the tables, write what is asked for."""
    from nemo_llm.checkpoint.folder import step_of
    from nemo_llm.evaluation.report import as_text, write_html, write_json
    from nemo_llm.evaluation.suite import measure, read_suite
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.inference.scoring import ModelScorer
    from nemo_llm.parallel.runtime import own_runtime

    suite = read_suite(cfg)
    opened = [(name, open_checkpoint(cfg, path, launched_world_size())) for name, path in find_models(cfg)]
    results = []
    with own_runtime(opened[0][1].runtime) as runtime:
        for name, found in opened:
            scorer = ModelScorer(load_model(found, runtime, cfg.verify), cfg.batch_size)
            results.append(measure(suite, scorer, name, found.folder, step_of(found.folder)))
            del scorer
    if is_first_rank():
        print(as_text(results))
        if cfg.output is not None:
            write_json(results, Path(cfg.output).expanduser())
        if cfg.report is not None:
            write_html(results, Path(cfg.report).expanduser())


def find_models(cfg: EvaluateConfig) -> list[tuple[str, Path]]:
    """Name and folder of every checkpoint to measure; with ``every_checkpoint`` the steps of a run, oldest first."""
    from nemo_llm.checkpoint.folder import find_checkpoints, resolve_checkpoint

    named = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else cfg.checkpoint
    paths = [Path(name).expanduser() for name in named]
    if not cfg.every_checkpoint:
        labels = [path.name or str(path) for path in paths]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in paths]
        return [(label, resolve_checkpoint(path)) for label, path in zip(labels, paths, strict=True)]
    found = []
    for path in paths:
        resolve_checkpoint(path)  # says what is wrong where there is none
        for step in reversed(find_checkpoints(path)):
            found.append((step.name if len(paths) == 1 else f"{path.name} {step.name}", step))
    return found


if __name__ == "__main__":
    sys.exit(run_tool("evaluate", EvaluateConfig, main))
