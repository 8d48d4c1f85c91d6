"""Prompts of plain text, from the command line and from files; `nemo_llm.conversation.prompts` has those of chats."""

from nemo_llm.corpus.documents import BadRecord, expand_inputs, file_format, read_documents, read_lines
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer


def read_prompts(pattern: str) -> list[str]:
    """Prompts of a file, folder or glob: the field ``text`` of JSON lines or Parquet, else one a line.

    Blank lines do not count.

    Raises:
        InputError: a file that is missing, empty or cannot be read, with the line.
    """
    prompts: list[str] = []
    for path in expand_inputs(pattern):
        if file_format(path) == "text":
            prompts += [line for _, line in read_lines(path)]
        else:
            prompts += [document.text for document in read_documents(path, "text", _refuse_record)]
    if not prompts:
        raise InputError(f"text_file={pattern}: holds no prompt")
    return prompts


def _refuse_record(record: BadRecord) -> None:
    raise InputError(
        f'{record.file}, line {record.line}: expected {{"text": "..."}}, but {record.reason}: {record.detail}'
    )


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue: the beginning-of-text token first where the model has one."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eod_id]
