"""lm-eval's tasks on our models: its ``LM`` interface, and its standard tasks from local files.

The package is the extra ``eval``; it is imported when tasks are asked for. Every rank runs the whole harness with the
same requests, since each request is a collective of all ranks; only the first one's results are printed.
"""

import contextlib
import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_llm.config.compose.catalog import nearest
from nemo_llm.conversation.sandbox import sandbox
from nemo_llm.corpus.records import find_record_files, read_all_records
from nemo_llm.errors import InputError
from nemo_llm.evaluation.scorer import Scorer
from nemo_llm.migrate.yaml import check_yaml

TASKS_FOLDER = Path(__file__).parent / "tasks"
_DEFAULT_NEW_TOKENS = 256
# Keys of a task file that say how to ask and to score. Others of lm-eval's name code or data of their own (use_prompt,
# process_docs, unsafe_code, dataset_kwargs with trust_remote_code).
_TASK_KEYS = frozenset(
    (
        *("task", "task_alias", "tag", "dataset_path", "dataset_name", "training_split", "validation_split"),
        *("test_split", "fewshot_split", "doc_to_text", "doc_to_target", "doc_to_choice", "description"),
        *("target_delimiter", "fewshot_delimiter", "num_fewshot", "metric_list", "output_type", "generation_kwargs"),
        *("repeats", "filter_list", "should_decontaminate", "doc_to_decontamination_query", "gen_prefix", "metadata"),
    )
)
# The seed that lm-eval itself draws solved examples with, so that prompts are the same.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskFile:
    """One task to run: what kind it is, the data to ask, and solved examples for the prompt."""

    kind: str
    data: Path
    shots: Sequence[Path] = ()

    @property
    def name(self) -> str:
        return self.kind if self.data.stem.startswith(self.kind) else f"{self.kind}/{self.data.stem}"


def shipped_kinds() -> dict[str, Path]:
    """Kinds of tasks that come with the package, by name."""
    return {path.stem: path for path in sorted(TASKS_FOLDER.glob("*.yaml"))}


def find_task_files(tasks: Mapping[str, str | Sequence[str]], shots: Mapping[str, str]) -> list[TaskFile]:
    """Tasks of a mapping from a kind (or a task file of lm-eval's form, ``.yaml``) to a file, folder, glob or a list.

    Raises:
        InputError: an unknown kind, a path that is not there, or two files of one name.
    """
    found = []
    for kind, places in tasks.items():
        _specification(kind)
        for place in [places] if isinstance(places, str) else places:
            try:
                solved = find_record_files(shots[kind]) if kind in shots else []
                found += [TaskFile(kind, file, solved) for file in find_record_files(place)]
            except InputError as error:
                raise InputError(f"tasks.{kind}: {error}") from None
    names = Counter(file.name for file in found)
    if twice := [file for file in found if names[file.name] > 1]:
        raise InputError(f"tasks: the figures of {' and '.join(str(f.data) for f in twice)} would have the same name")
    return found


def run_tasks(
    scorer: Scorer, files: Sequence[TaskFile], limit: int | None, num_fewshot: int | None, prefix_id: int | None = None
) -> dict[str, dict[str, Any]]:
    """Figures of each task: ``{task: {metric: value, metric_stderr: value, "samples": number}}``.

    Args:
        limit: examples of each task; None takes all.
        num_fewshot: solved examples in the prompt; None takes the task's own number.
        prefix_id: token that stands before a text without a context; None: the tokenizer's beginning of text, else its
            end of a document.
    """
    results = evaluate(build_lm(scorer, prefix_id), files, limit, num_fewshot)
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        figures = {
            re.sub(r",none$", "", key): value
            for key, value in results["results"][file.name].items()
            if isinstance(value, int | float) and key not in ("sample_len",)
        }
        found[file.name] = {**figures, "samples": len(results["samples"][file.name]) // _filters(results, file.name)}
    return found


def evaluate(lm: Any, files: Sequence[TaskFile], limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    """What lm-eval's ``evaluate`` returns for an ``LM`` (ours or another) on these files.

    Not through ``simple_evaluate``, which reads each of the 14,000 task files that come with lm-eval and asks pip about
    its environment: 14 seconds of a processor and more at every evaluation while training.
    """
    lm_eval = _import_lm_eval()
    from lm_eval.tasks import TaskManager

    tasks = [build_task(file, num_fewshot) for file in files]
    for task in tasks:
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    loaded = TaskManager(include_defaults=False).load(tasks)
    try:
        with _first_local_rank():
            return lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True, bootstrap_iters=1000)
    except TemplateError as error:
        raise InputError(f"tasks: a template of {', '.join(file.kind for file in files)} is refused: {error}") from None


def build_task(file: TaskFile, num_fewshot: int | None) -> Any:
    """lm-eval's task object over a local file.

    Raises:
        InputError: a record without one of the task's fields.
    """
    _import_lm_eval()
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    specification = _specification(file.kind)
    fields = specification.get("metadata", {}).pop("fields", [])
    data = {"test": Dataset.from_list(_records(file.kind, [file.data], fields))}
    if file.shots:
        data["shots"] = Dataset.from_list(_records(file.kind, file.shots, fields))
        specification |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    config = {
        **specification,
        "task": file.name,
        "test_split": "test",
        "custom_dataset": lambda **_: data,
        "metadata": None,
    }
    config["num_fewshot"] = num_fewshot if num_fewshot is not None else config.get("num_fewshot", 0)
    if file.kind == "blimp":
        config["num_fewshot"] = 0
    try:
        return ConfigurableTask(config=config)
    except TemplateError as error:
        raise InputError(f"tasks.{file.kind}: a template of it is refused: {error}") from None


def build_lm(scorer: Scorer, prefix_id: int | None = None) -> Any:
    """Our model behind lm-eval's ``LM`` interface."""
    _import_lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = scorer.tokenizer

    class OurModel(TemplateLM):
        """``loglikelihood``, ``loglikelihood_rolling`` and ``generate_until`` through a `Scorer`."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod_id

        @property
        def prefix_token_id(self) -> int:
            if prefix_id is not None:
                return prefix_id
            return tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            start = [] if tokenizer.bos_id is None or add_special_tokens is False else [tokenizer.bos_id]
            return [*start, *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list, **_settings: Any) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                tokens = tokenizer.encode(request.args[0])
                rolling = get_rolling_token_windows(tokens, self.prefix_token_id, scorer.max_length, 1)
                pairs = [make_disjoint_window(pair) for pair in rolling]
                windows += pairs
                owners += [number] * len(pairs)
            sums = [0.0] * len(requests)
            for owner, (value, _greedy) in zip(owners, scorer.score(windows), strict=True):
                sums[owner] += value
            return sums

        def generate_until(self, requests: list, **_settings: Any) -> list[str]:
            results: dict[int, str] = {}
            groups: dict[tuple, list[int]] = {}
            for number, request in enumerate(requests):
                settings = request.args[1]
                until = settings.get("until") or []
                stop = (until,) if isinstance(until, str) else tuple(until)
                groups.setdefault((settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS), stop), []).append(number)
            for (count, stop), numbers in groups.items():
                prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                results.update(zip(numbers, scorer.generate(prompts, count, stop), strict=True))
            return [results[number] for number in range(len(requests))]

    return OurModel()


def _specification(kind: str) -> dict[str, Any]:
    """The task's YAML, shipped or the user's own."""
    shipped = shipped_kinds()
    path = Path(kind).expanduser() if kind.endswith(".yaml") else shipped.get(kind)
    if path is None:
        guess = nearest(kind, shipped)
        hint = f"did you mean {guess}? " if guess else ""
        raise InputError(
            f"tasks.{kind}: there is no such task.\n      fix: {hint}shipped are {', '.join(shipped)}; a task of your "
            "own is the path of a file in lm-eval's form, ending in .yaml"
        )
    if not path.is_file():
        raise InputError(f"tasks: {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, str(path))
        specification = dict(yaml.safe_load(text))
        metrics = [str(metric["metric"]) for metric in specification.get("metric_list") or []]
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: no task in lm-eval's form ({' '.join(str(error).split())})") from None
    _check_inert(path, specification, metrics)
    return specification


def _check_inert(path: Path, specification: dict[str, Any], metrics: list[str]) -> None:
    """Refuse what would have lm-eval run code that the file names.

    Raises:
        InputError: naming the key or the metric.
    """
    unknown = sorted(map(str, specification.keys() - _TASK_KEYS))
    if unknown:
        raise InputError(
            f"{path}: {unknown[0]} is not read here.\n      fix: remove it; read are {', '.join(sorted(_TASK_KEYS))}"
        )
    _import_lm_eval()
    from lm_eval.api import metrics as _  # noqa: F401  (they register themselves)
    from lm_eval.api.registry import metric_registry

    # lm-eval hands other names to `evaluate.load`, which runs the Python file of that name.
    for name, metric in zip(metrics, specification.get("metric_list") or [], strict=True):
        if name not in metric_registry or metric.get("hf_evaluate"):
            raise InputError(
                f"{path}: metric {name} is none of lm-eval's own.\n      fix: name one that it registers itself"
            )


def _records(kind: str, files: Sequence[Path], fields: Sequence[str]) -> list[dict[str, Any]]:
    records = []
    for path, line, record in read_all_records(files, fields if kind == "mmlu" else None):
        if missing := [field for field in fields if record.get(field) is None]:
            raise InputError(
                f"{path}, line {line}: no field {missing[0]!r}, which the task {kind} needs; it has {', '.join(record)}"
            )
        try:
            records.append(_hellaswag_fields(record) if kind == "hellaswag" else record)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {line}: no record of the task {kind} ({error})") from None
    if not records:
        raise InputError(f"{', '.join(map(str, files))}: holds no record")
    return records


def _hellaswag_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The question and the endings without WikiHow's marks, as lm-eval's own task has them."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    query = clean(f"{record['activity_label']}: {context}")
    return {"query": query, "choices": [clean(ending) for ending in record["endings"]], "label": int(record["label"])}


def _filters(results: Mapping[str, Any], task: str) -> int:
    """How many times each example stands among the samples: once for each filter of answers."""
    return max(1, len({sample.get("filter", "none") for sample in results["samples"][task]}))


@contextlib.contextmanager
def _first_local_rank() -> Iterator[None]:
    """lm-eval 0.4.13 returns results where ``LOCAL_RANK`` is 0 alone; here every rank needs them."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _import_lm_eval() -> Any:
    """lm-eval, quiet and off the network.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks: needs lm-eval, which is not installed.\n      fix: pip install 'nemo_llm[eval]'")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It would fork this process, with its process groups and threads, to resample figures.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    import lm_eval
    from lm_eval import utils

    # lm-eval 0.4.13 renders templates of task files without a sandbox: `cycler.__init__.__globals__.os` runs commands.
    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        environment = sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
        environment.filters.update(utils.env.filters)
        utils.env = environment
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval
