"""Reads files under Python's audit hooks: ``python -m tests.attack.guard WORK`` with the cases in ``WORK/cases.json``.

Each case (a reader's name and a path) runs in a fork of this process, which has imported everything. The hook forbids
and records commands, network, libraries, Python files of the work folder, pickled classes that lead to any of them,
and every change of a file outside of ``WORK/out``. How each case ended is a line of ``WORK/results.jsonl``.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_NEVER = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.forkpty", "pty.spawn")
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "ctypes.dlopen", "ftplib.connect", "urllib.Request")
# Events of changed names: where their paths stand among the arguments, and where the folder that each is relative to.
_CHANGES = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MODULES = ("os", "posix", "subprocess", "sys", "pty", "shutil", "pathlib", "runpy", "code", "importlib", "builtins")


class Guard:
    """The hook; nothing is forbidden before `armed` is set."""

    def __init__(self, work: Path) -> None:
        self.work = str(work)
        self.allowed = (str(work / "out"), "/dev/null", "/dev/shm")
        self.armed = False
        self.record = os.open(work / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and self._forbidden(event, arguments):
            os.write(self.record, f"{event} {arguments!r}"[:500].encode() + b"\n")
            raise PermissionError(f"forbidden: {event}")

    def _forbidden(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "subprocess.Popen" and arguments[1][:2] == ["git", "-C"]:
            return False  # a run notes the commit of its own code
        if event in _NEVER or event in _NETWORK:
            return True
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITES)
            return writes and self._outside(path)
        if event in _CHANGES:
            return any(self._outside(arguments[path], arguments[folder]) for path, folder in _CHANGES[event])
        if event == "exec":
            return str(getattr(arguments[0], "co_filename", "")).startswith(self.work)
        return event == "pickle.find_class" and arguments[0] in _MODULES and arguments[1] not in ("set", "slice")

    def _outside(self, path: Any, folder: int = -1) -> bool:
        if isinstance(path, int):
            return False
        start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        return not os.path.normpath(os.path.join(start, os.fsdecode(path))).startswith(self.allowed)


def weights(path: Path, out: Path) -> int:
    """Everything in ``state``, through the reader of files and through PyTorch's."""
    from nemo_llm.checkpoint.inspect import read_tensors, tensors
    from nemo_llm.checkpoint.safe_load import check_safe
    from nemo_llm.checkpoint.state_files import NativeReader

    del out
    check_safe(path / "state")
    reader = NativeReader(path / "state")
    for key in reader.infos:
        reader.read(key)
    list(read_tensors(path, list(tensors(path))))
    return 0


def generate(path: Path, out: Path) -> int:
    from nemo_llm.config.commands.entry import run_tool
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.generate import main

    del out
    words = [f"checkpoint={path}", "text=hello", "sampling.max_new_tokens=2", "accelerator=cpu"]
    return run_tool("generate", GenerateConfig, main, words)


def train(path: Path, out: Path) -> int:
    from nemo_llm.config.commands.entry import run_entry_point
    from nemo_llm.train import main

    words = ["+model=from_checkpoint", f"model.checkpoint_path={path}", f"checkpoint.init_from={path}"]
    sizes = ["trainer.max_steps=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1", "data.seq_length=32"]
    rest = ["trainer.accelerator=cpu", f"run.dir={out}/run", "exp_manager.enabled=false", "sample.enabled=false"]
    return int(run_entry_point(main, [*words, *sizes, *rest]))


def show(path: Path, out: Path) -> int:
    from tools.inspect_checkpoint import main

    del out
    return main(["show", str(path), "--norms"])


def _convert(path: Path, out: Path, source: str, target: str, *more: str) -> int:
    from tools.convert_checkpoint import main

    return main([f"source_format={source}", f"target_format={target}", f"input={path}", f"output={out}/made", *more])


def to_hf(path: Path, out: Path) -> int:
    return _convert(path, out, "nemo_llm", "hf")


def from_megatron(path: Path, out: Path) -> int:
    return _convert(path, out, "megatron", "nemo_llm")


def from_hf(path: Path, out: Path) -> int:
    return _convert(path, out, "hf", "nemo_llm", "allow_pickle=true")


def template(path: Path, out: Path) -> int:
    from nemo_llm.evaluation.templates import Example, load_template

    del out
    load_template(str(path)).render(Example("a text", "a", {}), [Example("b", "b", {})], ["a", "b"])
    return 0


def chat_template(path: Path, out: Path) -> int:
    from nemo_llm.conversation.template import ChatTemplate

    del out
    ChatTemplate(path.read_text(), str(path), {}).render([{"role": "user", "content": "x"}])
    return 0


def task(path: Path, out: Path) -> int:
    from nemo_llm.config.sections.data import TokenizerConfig
    from nemo_llm.evaluation.harness import TaskFile, build_lm, evaluate
    from nemo_llm.tokenizers.tokenizer import load_tokenizer

    records = out / "records.jsonl"
    records.write_text(json.dumps({"question": "who?", "answer": "a"}) + "\n")
    settings = dict.fromkeys(("path", "eod_token", "bos_token", "tiktoken_pattern", "nemo_class"))
    tokenizer = load_tokenizer(
        TokenizerConfig(name="byte", type="byte", parse_special_tokens=False, nemo_args={}, **settings)  # type: ignore[arg-type]
    )
    scorer: Any = SimpleNamespace(tokenizer=tokenizer, max_length=64)  # is asked nothing: the templates come before
    evaluate(build_lm(scorer), [TaskFile(str(path), records)], None, 0)
    return 0


READERS: dict[str, Callable[[Path, Path], int]] = {
    function.__name__: function
    for function in (
        weights, generate, train, show, to_hf, from_megatron, from_hf, template, chat_template, task,
    )
}  # fmt: skip


def _run(guard: Guard, case: dict[str, str], number: int) -> None:
    """In a fork: read one file; ends the process."""
    from nemo_llm.errors import NemoLlmError

    out = Path(guard.work) / "out" / str(number)
    out.mkdir()
    text = os.open(Path(guard.work) / "out" / f"{number}.log", os.O_WRONLY | os.O_CREAT)
    yes = os.open(Path(guard.work) / "yes", os.O_RDONLY)
    for source, target in ((yes, 0), (text, 1), (text, 2)):
        os.dup2(source, target)
    os.environ["TMPDIR"] = os.environ["NEMO_LLM_CACHE"] = str(out)
    signal.alarm(100)
    guard.armed = True
    try:
        code = int(READERS[case["reader"]](Path(case["path"]), out))
    except NemoLlmError as error:
        print(f"error: {error}")
        code = int(error.exit_code)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _import_all(work: Path) -> None:
    """What the readers import on first use, and what these libraries start once."""
    import nemo_llm.convert.convert
    import nemo_llm.evaluation.harness
    import nemo_llm.generate
    import nemo_llm.train
    import nemo_llm.training.checkpoint
    from nemo_llm.megatron import cuda_on_cpu

    cuda_on_cpu.install()
    from megatron.core.models.gpt import GPTModel  # noqa: F401

    import nemo_llm.convert.megatron
    import nemo_llm.inference.loaded_model
    import nemo_llm.training.setup

    with contextlib.suppress(ImportError):
        nemo_llm.evaluation.harness._import_lm_eval()
        import lm_eval.api.task  # noqa: F401
    with contextlib.suppress(ImportError):
        from nemo.collections.common import tokenizers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    del work


def main(work: Path) -> None:
    """Run all cases."""
    sys.dont_write_bytecode = True
    (work / "yes").write_text("y\n" * 100)
    _import_all(work)
    guard = Guard(work)
    sys.addaudithook(guard)
    with (work / "results.jsonl").open("w", buffering=1) as results:
        for number, case in enumerate(json.loads((work / "cases.json").read_text())):
            before = (work / "events").stat().st_size
            child = os.fork()
            if child == 0:
                _run(guard, case, number)
            status = os.waitpid(child, 0)[1]
            events = (work / "events").read_text()[before:]
            said = (work / "out" / f"{number}.log").read_text(errors="replace")
            row = {**case, "code": os.waitstatus_to_exitcode(status), "events": events, "said": said[-3000:]}
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
