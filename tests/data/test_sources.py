"""Every kind of source fulfils every duty: the tests walk the registry, and a new kind needs an example here."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from nemo_llm.config import RunConfig
from nemo_llm.config.compose.arguments import as_hydra
from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.config.sections.labelled import LabelledConfig
from nemo_llm.config.sections.sources import SHORT_FORMS, BlendSource, FileSource, SourceSection
from nemo_llm.data.build import DataSets, build_train_and_validation
from nemo_llm.data.index.build import build_index
from nemo_llm.data.sampling.blend_history import check_blend_history
from nemo_llm.data.sources.kind import SourceKind
from nemo_llm.data.sources.registry import KINDS, source_kind
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.errors import ConfigError
from nemo_llm.run.folder import open_run_dir
from nemo_llm.tokenizers.tokenizer import Tokenizer
from tests.data.test_index import job, write_jsonl

WORDS = [f"{word} " * (20 + 3 * number) for number, word in enumerate(["the whale", "a ship", "the sea"] * 4)]


def _lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _indexed(folder: Path, texts: list[str]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    build_index(job([write_jsonl(folder / "in.jsonl", texts)], folder / "d"))
    return {"path": str(folder / "d")}


def _text(folder: Path, texts: list[str]) -> dict[str, Any]:
    return {"path": _lines(folder / "a.jsonl", [{"text": text} for text in texts])}


def _chat(folder: Path, texts: list[str]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "Aye."}
    return {"path": _lines(folder / "a.jsonl", [{"messages": [{"role": "user", "content": t}, answer]} for t in texts])}


def _labelled(folder: Path, texts: list[str]) -> dict[str, Any]:
    return {
        "path": _lines(folder / "a.jsonl", [{"text": f"{t}{n}", "label": "ab"[n % 2]} for n, t in enumerate(texts)])
    }


def _mock(_folder: Path, texts: list[str]) -> dict[str, Any]:
    return {"num_documents": len(texts), "mean_document_length": 40}


EXAMPLES: dict[str, Callable[[Path, list[str]], dict[str, Any]]] = {
    "indexed": _indexed,
    "text": _text,
    "chat": _chat,
    "labelled": _labelled,
    "mock": _mock,
}
"""Keys of a source of each kind, which is written into a folder from some texts."""
SECTIONS: dict[str, type[SourceSection]] = {
    kind: member for member in get_args(get_args(BlendSource)[0]) for kind in get_args(member.__annotations__["kind"])
}
COMMON = {"name", "kind", "weight"}


def entry(kind: str, folder: Path, texts: list[str] = WORDS, **keys: Any) -> SourceSection:
    return SECTIONS[kind](name="one", **EXAMPLES[kind](folder, texts), **keys)


def opened(data_config: Callable, tokenizer: Tokenizer, entries: tuple[SourceSection, ...], **changes: Any) -> DataSets:
    labelled = LabelledConfig(label_key="label", too_long="truncate")
    keys = {"packing": "none", "labelled": labelled, "seq_length": 96, "split": "75,25"} | changes
    return build_train_and_validation(data_config(blend=entries, **keys), tokenizer, 3, classes=("a", "b"))


def test_every_kind_has_its_keys_its_class_and_its_example() -> None:
    assert set(SECTIONS) == set(KINDS) == set(EXAMPLES) == set(SHORT_FORMS.values())
    for kind, source in KINDS.items():
        assert issubclass(source, SourceKind)
        assert not inspect.isabstract(source), kind
        assert not inspect.isabstract(SECTIONS[kind]), kind
        assert isinstance(SECTIONS[kind].packs, bool)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_every_key_but_name_and_weight(kind: str, tmp_path: Path) -> None:
    one = entry(kind, tmp_path)
    assert dataclasses.replace(one, name="other", weight=0.5).identity == one.identity
    own = {field.name for field in dataclasses.fields(one)} - COMMON
    assert own
    for key in own:
        value = getattr(one, key)
        changed = dataclasses.replace(one, **{key: f"{value}x" if isinstance(value, str) else value + 1})
        assert changed.identity != one.identity, key
    for other in SECTIONS.values():
        if other is not type(one) and {field.name for field in dataclasses.fields(other)} == own | COMMON:
            assert other(name="one", **{key: getattr(one, key) for key in own}).identity != one.identity


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_missing_are_named(kind: str, tmp_path: Path) -> None:
    one = entry(kind, tmp_path)
    assert list(one.check("data.blend[0]")) == []
    if "path" not in {field.name for field in dataclasses.fields(one)}:
        return
    (problem,) = dataclasses.replace(one, path=str(tmp_path / "gone")).check("data.blend[0]")
    assert problem.key == "data.blend[0].path"
    assert problem.value == str(tmp_path / "gone")


@pytest.mark.parametrize("packing", ["none", "best_fit", "concatenate"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_is_split_and_gives_samples(
    kind: str, packing: str, data_config: Callable, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one = entry(kind, tmp_path, [f"{text}{number}" for number, text in enumerate(WORDS * 3)])
    assert source_kind(one).unread_bytes() >= 0
    masks = {"reset_attention_mask": True, "reset_position_ids": True}
    sets = opened(data_config, demo_tokenizer, (one,), packing=packing, **masks)
    (training,), (held_out,) = sets.train.sources, sets.validation["split"].sources
    read = {number for n in range(training.samples_per_epoch) for number in training.documents_of(n)}
    kept = {number for n in range(held_out.samples_per_epoch) for number in held_out.documents_of(n)}
    assert read
    assert kept
    if one.packs:
        assert not read & kept
    sample = sets.train[0]
    assert sample.tokens.shape == (97,)
    assert (sample.labels is not None) == (kind == "labelled")
    again = opened(data_config, demo_tokenizer, (one,), packing=packing, **masks)
    np.testing.assert_array_equal(again.train[0].tokens, sample.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_told_by_its_content(
    kind: str, data_config: Callable, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def store(folder: str, texts: list[str]) -> TokenStore:
        sets = opened(data_config, demo_tokenizer, (entry(kind, tmp_path / folder, texts),))
        return sets.train.sources[0]._store

    first, second = store("a", WORDS), store("b", [*WORDS, "more of it"])
    assert isinstance(first, TokenStore)
    assert json.dumps(first.identity) != json.dumps(second.identity)
    assert first.has_learned == SECTIONS[kind].packs


def test_one_file_is_a_source_of_each_kind_that_reads_it(
    data_config: Callable, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Ho!"}, {"role": "assistant", "content": "Aye."}]
    path = _lines(tmp_path / "all.jsonl", [{"text": text, "label": "a", "messages": messages} for text in WORDS])
    entries = tuple(
        section(name=kind, path=path) for kind, section in SECTIONS.items() if issubclass(section, FileSource)
    )
    sets = opened(data_config, demo_tokenizer, entries, split=None)
    stores = {source.name: source._store for source in sets.train.sources}
    assert {kind: (store.has_learned, store.has_targets) for kind, store in stores.items()} == {
        "text": (False, False),
        "chat": (True, False),
        "labelled": (True, True),
    }


def run_config(entries: list[dict[str, Any]], folder: Path | None = None) -> RunConfig:
    keys = ["data=blend", "data.packing=none", f"data.blend={as_hydra(entries)}", f"run.dir={folder or 'null'}"]
    return compose(["+model=gpt_tiny", *keys])


@pytest.mark.parametrize("short", SHORT_FORMS)
def test_short_long_and_earlier_forms_are_the_same(short: str, tmp_path: Path) -> None:
    kind = SHORT_FORMS[short]
    own = EXAMPLES[kind](tmp_path / "a", WORDS)
    value = own if kind == "mock" else own["path"]
    earlier = dict.fromkeys(SHORT_FORMS) | {"name": "one", "weight": None, short: value}
    forms = [{"name": "one", short: value}, {"name": "one", "kind": kind, **own}, earlier]
    first, *others = [to_dict(run_config([form]))["data"] for form in forms]
    assert first["blend"] == ({"name": "one", "kind": kind, "weight": None, **own},)
    assert others == [first, first]


@pytest.mark.parametrize("key", ["pairs", "prompts"])
@pytest.mark.parametrize("form", ["short", "long"])
def test_kinds_that_there_are_not_yet_are_refused_with_those_that_there_are(key: str, form: str) -> None:
    entry = {"name": "one", key: "a.jsonl"} if form == "short" else {"name": "one", "kind": key, "path": "a.jsonl"}
    with pytest.raises(ConfigError) as caught:
        run_config([entry])
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("data.blend[0].kind", key)
    assert all(kind in problem.rule for kind in KINDS)


@pytest.mark.parametrize(
    ("blend", "key"),
    [
        ("[0.3,a,0.7]", "data.blend[1].path"),
        ("[a,0.3]", "data.blend[0].weight"),
        ("[a,'0.3']", "data.blend[0].weight"),
        ("[0.3,a,b,c]", "data.blend[1].weight"),
        ("[3]", "data.blend[0].path"),
        ("[~no-such-user/a]", "data.blend[0].path"),
        ("[{name: one, text: a, chat: b}]", "data.blend[0].chat"),
        ("[{name: one, kind: text, text: a}]", "data.blend[0].text"),
        ("[{name: one, mock: {num_documents: 1, mean_document_length: 2, name: two}}]", "data.blend[0].mock"),
        ("[{name: one, mock: {kind: text, path: a}}]", "data.blend[0].mock"),
        ("[{name: one, mock: 5}]", "data.blend[0].mock"),
        ("[{name: one, text: null}]", "data.blend[0].kind"),
        ("[{name: one, texts: a}]", "data.blend[0].texts"),
        ("[{name: one, kind: [text]}]", "data.blend[0].kind"),
        ("[{name: one, text: a}, b]", "data.blend[1]"),
    ],
)
def test_what_is_no_source_is_named(blend: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["+model=gpt_tiny", f"data.blend={blend}"])
    assert key in {problem.key for problem in caught.value.problems}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_keys_of_another_kind_are_refused_by_name(kind: str, other: str, tmp_path: Path) -> None:
    own, foreign = EXAMPLES[kind](tmp_path / "a", WORDS), EXAMPLES[other](tmp_path / "b", WORDS)
    extra = {key: value for key, value in foreign.items() if key not in own}
    extra |= {short: "x" for short, name in SHORT_FORMS.items() if name == other}
    with pytest.raises(ConfigError) as caught:
        run_config([{"name": "one", "kind": kind, **own, **extra}])
    assert {problem.key for problem in caught.value.problems} == {f"data.blend[0].{key}" for key in extra}
    assert all(kind in problem.rule for problem in caught.value.problems)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_was_read_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    """Of every kind, and also when the path stays and the kind changes."""
    here, there = EXAMPLES[kind](tmp_path / "a", WORDS), EXAMPLES[kind](tmp_path / "b", [*WORDS, "more"])
    folder = tmp_path / "run"
    with open_run_dir(run_config([{"name": "one", "kind": kind, **here}], folder)):
        step = folder / "checkpoints" / "step_00000010"
        step.mkdir(parents=True)
        (step / "COMPLETE").touch()
        (step / "training.json").write_text('{"consumed_samples": 10}')
    others = [{"kind": kind, **there}]
    others += [{"kind": name, **here} for name in KINDS if name != kind and "path" in here and name != "mock"]
    for other in others:
        with pytest.raises(ConfigError, match=r"data\.blend \(one\).*the run has read this source from"):
            open_run_dir(run_config([{"name": "one", **other}], folder))
    new = {"name": "two", "kind": kind, **there, "weight": 0.0}
    before = {"name": "one", "kind": kind, **here, "weight": 1.0}
    saved = run_config([before]).data
    assert list(check_blend_history(saved, run_config([before, new]).data, 10)) == []
    with open_run_dir(run_config([{"name": "one", "kind": kind, **here}], folder)) as run_dir:
        assert run_dir.changes == []
