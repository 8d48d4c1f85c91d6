"""Texts, names and paths on the command line: taken as they stand by every command, whatever is in them."""

import os
import random
import subprocess
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_llm.config.commands.convert import ConvertConfig, ImportConfig
from nemo_llm.config.commands.data import IndexConfig, TrainTokenizerConfig, compose_mapping, compose_tool
from nemo_llm.config.commands.evaluate import EvaluateConfig
from nemo_llm.config.commands.generate import ChatToolConfig, GenerateConfig
from nemo_llm.config.commands.prepare import PrepareConfig
from nemo_llm.config.compose.arguments import Texts, as_hydra
from nemo_llm.config.compose.catalog import conf_dir, group_choices, known_keys, union_members
from nemo_llm.config.compose.load import _compose_mapping, compose
from nemo_llm.config.compose.overrides import normalise
from nemo_llm.config.sections.fields import HomeExpanded
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, type] = {
    "generate": GenerateConfig,
    "chat": ChatToolConfig,
    "evaluate": EvaluateConfig,
    "convert_checkpoint": ConvertConfig,
    "index_dataset": IndexConfig,
    "import_config": ImportConfig,
    "prepare_data": PrepareConfig,
    "train_tokenizer": TrainTokenizerConfig,
}
NASTY = [
    *("What's up? (2+2=4, é)", "Hello, world", "你好", 'say "hi"', "[INST] hi [/INST]", "# title", "2+2=", "Dear Sir,"),
    *("1e-3", "true", "007", "42", "a\\", "\\'", "it's", "'", '"', "${model.name}", "$HOME", "\\${x}", "${", "???"),
    *("/data/step=100", "run--loss=0.12-consumed_samples=1000.0-last", "/x/Ünï (1)/[v2]/{a}", "a,b", "a: b", "{a: b"),
    *(
        " two  blanks ",
        "line\nbreak",
        "<|im_end|>",
        "a & b; c | d > e * ?",
        "!x",
        "@y",
        "%z",
        "+a",
        "-c",
        "choice(a,b)",
    ),
    *('"a" and "b"', "NEMO_LLM_TEXT_0_", "null and void", "97,3", "Et*3|(tt|)*29,m|L", "x~b"),
]


def members(annotation: Any) -> list[Any]:
    return [get_args(one)[0] if get_origin(one) is Annotated else one for one in union_members(annotation)]


def text_keys(section: type) -> list[str]:
    """Keys that take text and can be set by themselves: those of a list's items cannot."""
    keys = known_keys(section)
    lists = [
        key for key, info in keys.items() if any(get_origin(one) in (list, tuple) for one in members(info.annotation))
    ]
    inner = [key for key in keys if any(key.startswith(f"{one}.") for one in lists)]
    return [key for key, info in keys.items() if str in members(info.annotation) and key not in inner]


def value_at(mapping: Any, key: str) -> Any:
    for part in key.split("."):
        mapping = mapping[part]
    return mapping


def train_mapping(overrides: list[str]) -> dict[str, Any]:
    texts = Texts()
    arguments, problems = normalise(overrides, conf_dir(), group_choices([conf_dir()]), texts)
    assert not problems
    return texts.restore(_compose_mapping(conf_dir(), arguments))


def filled(name: str) -> list[str]:
    """Values for what a command must be given."""
    lines = (conf_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    missing = [line.partition(":")[0] for line in lines if line.endswith(": ???")]
    return [f"{key}={{a: b}}" if (name, key) == ("train_tokenizer", "input") else f"{key}=x" for key in missing]


@pytest.mark.parametrize("name", [*COMMANDS, "train"])
def test_every_key_of_text_takes_its_argument_as_it_stands(name: str) -> None:
    section = COMMANDS.get(name, RunConfig)
    keys = text_keys(section)
    assert len(keys) >= 3
    draw = random.Random(name)
    for start in range(0, len(NASTY), 9 if name == "train" else 6):
        chosen = {key: draw.choice(NASTY[start : start + 9]) for key in keys}
        overrides = [f"{key}={value}" for key, value in chosen.items()]
        if name == "train":
            mapping = train_mapping(["+model=moe_tiny", "peft=lora", "data=books", *overrides])
        else:
            mapping = compose_mapping(name, section, [*filled(name), *overrides])
        assert {key: value_at(mapping, key) for key in keys} == chosen


@seed(20261129)
@settings(deadline=None, max_examples=80)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_drawn_texts_are_taken_as_they_stand(text: str) -> None:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_quoted or text == "null" or text.strip()[:1] in ("[", "{"):
        return  # the three forms that mean something else; see below
    mapping = compose_mapping("generate", GenerateConfig, ["checkpoint=x", f"text={text}", f"chat_template={text}"])
    assert (mapping["text"], mapping["chat_template"]) == (text, text)


@seed(20261129)
@settings(deadline=None, max_examples=80)
@given(value=st.recursive(st.text(max_size=12), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.from_regex(r"[a-z]{1,5}_", fullmatch=True), inner, max_size=3), max_leaves=6))  # fmt: skip
@example(value="a\\'b\\\\${x}\\")
@example(value=["\\", "'", "\\\\'"])
def test_hydras_grammar_gives_back_what_was_written_in_it(value: Any) -> None:
    texts = Texts()
    for written in (as_hydra(value), texts.hide(value)):
        override = texts_parse(written)
        found = OmegaConf.to_container(OmegaConf.create({"key": override}), resolve=True)["key"]
        assert texts.restore(found) == value


def test_keys_of_mappings_that_are_no_words_to_hydra_come_back_too() -> None:
    texts = Texts()
    value = {"nan": "a", "null": "b", "my key": "c", "x=1/é": ["d"]}
    assert texts.restore(texts_parse(texts.hide(value))) == value


def texts_parse(written: str) -> Any:
    from nemo_llm.config.compose.arguments import parse

    override = parse(f"key={written}")
    assert override is not None, written
    return override.value()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("null", None),
        ("'null'", "null"),
        ('"Once upon a time"', "Once upon a time"),
        ("'it\\'s'", "it's"),
        ('"${sampling.seed} ${batch_size}"', "1234 16"),
        ("[a,b]", ["a", "b"]),
        ("[a, 42]", ["a", "42"]),
        ("[007, 1e3]", ["007", "1e3"]),
        ("[\"What's up?\", 'b, c']", ["What's up?", "b, c"]),
        ("[/x/step=1, ~/b]", ["/x/step=1", "~/b"]),
        ("[INST] hi", "[INST] hi"),
        ("", ""),
    ],
)
def test_what_is_not_taken_as_it_stands(argument: str, expected: Any) -> None:
    """null, one quoted string, and lists where a key takes them."""
    assert compose_mapping("generate", GenerateConfig, ["checkpoint=x", f"text={argument}"])["text"] == expected


def test_other_keys_read_as_before(tmp_path: Path) -> None:
    cfg = compose_tool(
        "evaluate",
        EvaluateConfig,
        ["checkpoint=[a,b]", "tasks={lambada: /x/step=1.jsonl}", "tasks.blimp=~/b, c", "limit=3"],
    )
    assert (cfg.checkpoint, cfg.limit) == (["a", "b"], 3)
    assert cfg.tasks == {"lambada": "/x/step=1.jsonl", "blimp": os.path.expanduser("~/b, c")}
    blend = "[{name: mine, text: ~/step=1 (a).txt, weight: 1e-3}]"
    run = compose(
        ["+model=gpt_tiny", f"data.blend={blend}", "exp_manager.wandb_logger_kwargs={project: p}", "+run.name=7"]
    )
    assert (run.data.blend[0].path, run.data.blend[0].weight) == (os.path.expanduser("~/step=1 (a).txt"), 1e-3)
    assert run.run.name == "7"
    notes = compose(
        ["+model=gpt_tiny", "exp_manager.wandb_logger_kwargs.notes=a (b), c", "exp_manager.wandb_logger_kwargs.n=3"]
    )
    assert notes.exp_manager.wandb_logger_kwargs == {"notes": "a (b), c", "n": 3}


@pytest.mark.parametrize("name", [*COMMANDS, "train"])
def test_paths_begin_at_home(name: str) -> None:
    section = COMMANDS.get(name, RunConfig)
    keys = known_keys(section)
    paths = [
        key
        for key in text_keys(section)
        if any(isinstance(mark, HomeExpanded) for one in union_members(keys[key].annotation) for mark in get_args(one))
    ]
    left = {
        "data.tokenizer.path",
        "model.hf_path",
        "model.checkpoint_path",
        "text_file",
    }  # others of their own go with them
    overrides = [f"{key}=~/some/{key}" for key in paths if key not in left]
    if name == "train":
        cfg: Any = compose(["+model=gpt_tiny", "peft=lora", *overrides])
    else:
        cfg = compose_tool(name, section, [*filled(name), *FORMATS.get(name, []), *overrides])
    assert len(overrides) >= 1
    for key in paths:
        if key in left:
            continue
        found = cfg
        for part in key.split("."):
            found = getattr(found, part)
        assert found == f"{Path.home()}/some/{key}"


FORMATS = {
    "convert_checkpoint": ["source_format=hf", "target_format=hf"],
    "generate": ["text=x"],
    "evaluate": [
        "classification={file: a, text_key: t, label_key: l, label_words: null, num_fewshot: 0, shots_file: null}"
    ],
}


def test_a_home_that_is_not_there_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"no user of this name") as caught:
        compose(["+model=gpt_tiny", "run.dir=~nobody_of_this_name/x"])
    assert caught.value.problems[0].key == "run.dir"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["outputs=x"], ["outputs", "did you mean output?"]),
        (["text"], ["'text' is not of the form key=value"]),
        (["text=a", "batch_size=1,2"], ["batch_size", "one value, not several"]),
        (["text=a", "batch_size=many"], ["batch_size = 'many'", "a whole number above 0"]),
        (["text=a", "dtype=fp64"], ["dtype", "did you mean dtype=fp16"]),
        (["text=a", "sampling.top_kk=2"], ["sampling.top_kk", "did you mean sampling.top_k?"]),
    ],
)
def test_mistakes_in_a_tools_arguments_are_named_in_our_words(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_tool("generate", GenerateConfig, ["checkpoint=x", *arguments])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "+" not in str(caught.value)


def test_a_job_script_reads_run_dir_as_the_program_does() -> None:
    script = 'OVERRIDES=("run.dir=~/a b" "++run.dir=~/x=1 (2)"); override run.dir; cd /; [ ! -e "~" ]'
    lines = (ROOT / "slurm" / "lib.sh").read_text()
    after = lines.index("\n}\n", lines.index("override() {"))
    function = lines[lines.index("unquoted() {") : after] + "\n}\n"
    done = subprocess.run(["bash", "-c", function + script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{Path.home()}/x=1 (2)"
