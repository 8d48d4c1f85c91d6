"""The blocks of README and docs: they run in a new shell as they stand, and set keys that there are."""

import re
import shlex
from collections.abc import Iterator

import pytest

from nemo_llm.config.compose.arguments import key_of
from nemo_llm.config.compose.catalog import annotation_at, conf_dir, group_choices
from nemo_llm.config.sections.run import RunConfig
from tests.config.test_arguments import COMMANDS
from tests.test_architecture import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCHEMAS = {"train": RunConfig, **COMMANDS}
GROUPS = group_choices([conf_dir()])
BLOCK = re.compile(r"^```(bash)?\n(.*?)^```$|((?:^    \S[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
WITHOUT_ENVIRONMENT = re.compile(r"(?<![\w/.-])(python|torchrun|pip|tensorboard)(?= )")


def blocks(text: str) -> list[str]:
    return [fenced or indented for _, fenced, indented in BLOCK.findall(text)]


COMMAND = re.compile(r"-m nemo_llm\.(\w+)|tools/(\w+)\.py|slurm/(\w+)\.sh")


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """(name, words) of each of our commands, comments left out and broken lines joined."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | ; ", line):
            if found := COMMAND.search(part):
                name = "train" if found[3] in ("pretrain", "finetune", "local") else found[1] or found[2] or ""
                yield name, shlex.split(part, comments=True)


def test_every_block_of_the_readme_runs_in_a_new_shell() -> None:
    checked = 0
    for _, fenced, indented in [found for found in BLOCK.findall(README) if found[0] or found[2]]:
        block = fenced or indented
        active = False
        for line in block.splitlines():
            active = active or line.strip() in ("source .venv/bin/activate", ". .venv/bin/activate")
            code = line.partition("#")[0] if line.startswith("#") else line
            if found := WITHOUT_ENVIRONMENT.search(code):
                checked += 1
                assert active, f"{found[1]} without an active environment: {line}"
    assert checked >= 15


def arguments_of(page: str) -> Iterator[tuple[str, str]]:
    """(command, argument) of every ``key=value`` that a page's blocks hand to a command composed from conf/."""
    for block in blocks(page):
        for name, words in commands(block):
            if name in SCHEMAS:
                yield from ((name, word) for word in words if re.match(r"\+{0,2}[a-z][\w./]*=", word))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_set_keys_that_there_are(page) -> None:
    for name, argument in arguments_of(page.read_text(encoding="utf-8")):
        key, value = key_of(argument), argument.partition("=")[2]
        choices = GROUPS.get(key, ())
        in_conf = (conf_dir() / key / f"{value}.yaml").is_file()
        known = annotation_at(key.split("."), SCHEMAS[name]) is not None
        assert in_conf or (known and (value not in choices)), f"{name} {argument}: no such key or choice"


def test_the_readme_is_among_what_is_looked_at() -> None:
    found = list(arguments_of(README))
    assert len(found) >= 40
    assert {name for name, _ in found} >= {"train", "generate", "evaluate", "convert_checkpoint", "index_dataset"}


def test_the_cluster_command_of_the_readme_fits_its_nodes() -> None:
    """It passes the check that slurm/pretrain.sh makes, for as many nodes as it asks for."""
    from nemo_llm.config.commands.entry import load
    from nemo_llm.training.check_only import report

    (line,) = [line for line in README.splitlines() if line.startswith("    bash slurm/pretrain.sh")]
    overrides = [word for word in shlex.split(line)[2:] if not word.startswith("-")]
    (nodes,) = re.findall(r"--nodes=(\d+)", line)
    cfg = load([*overrides, "trainer.check_only=true", f"trainer.num_nodes={nodes}", "trainer.devices=8"])
    assert "peak" in report(cfg, 8 * int(nodes), 128256)
    assert cfg.parallelism.tensor_model_parallel_size <= 2, "more for eight billion parameters only costs speed"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
