"""More tokens for a trained model: its tokenizer and the rows of its embedding and output layer grow together."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from nemo_llm.checkpoint.folder import TOKENIZER_FOLDER_NAME, require_weights, writing
from nemo_llm.checkpoint.inspect import read_tensors
from nemo_llm.checkpoint.new_tokens import NEW_TOKENS, new_tokens
from nemo_llm.checkpoint.safe_load import load_sharded
from nemo_llm.checkpoint.saved_run import TOKENIZER_FILE_NAME, SavedRun, write_config
from nemo_llm.checkpoint.weights import apply_model_state, model_state, save_weights
from nemo_llm.convert.logit_check import float32_model, saved_model
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import HuggingFaceTokenizer, load_tokenizer_from_folder

Start = Literal["pieces", "mean"]
_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


def extend_vocabulary(checkpoint: Path, output: Path, tokens: Sequence[str], start: Start, special: bool) -> int:
    """Write ``output``, a checkpoint of weights alone (float32) that knows ``tokens`` too; returns its vocabulary.

    Runs on one process. Of texts without the new tokens the model says the same, but for their share of the softmax.

    Args:
        start: a new token's rows are the mean of those of the tokens that it was written with (``pieces``), or of all.
        special: control tokens, which are never read from ordinary text.

    Raises:
        InputError: tokens that are there already, a tokenizer that cannot grow, an adapter, an output that exists.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; name another folder")
    saved = SavedRun.open(checkpoint)
    folder = saved.folder
    require_weights(folder)
    old = _check_tokenizer(folder, tokens)
    model = saved_model(saved)
    before = model.vocab_size or 0
    model = replace(model, vocab_size=max(before, old.vocab_size + len(tokens)))
    pieces = [old.encode(token) if start == "pieces" else list(range(old.vocab_size)) for token in tokens]
    with float32_model(model) as chunk, writing(output) as temporary:
        _load_grown(chunk, folder, before, (old.vocab_size, pieces))
        save_weights([chunk], temporary)
        _write_tokenizer(old, tokens, temporary / TOKENIZER_FOLDER_NAME, special)
        write_config(temporary, {**saved.mapping, "model": asdict(model)})
        new = {"tokens": [*new_tokens(folder), *tokens]}
        (temporary / NEW_TOKENS).write_text(json.dumps(new, ensure_ascii=False) + "\n", encoding="utf-8")
    return model.vocab_size or 0


def _check_tokenizer(folder: Path, tokens: Sequence[str]) -> HuggingFaceTokenizer:
    old = load_tokenizer_from_folder(folder / TOKENIZER_FOLDER_NAME)
    if not isinstance(old, HuggingFaceTokenizer) or old.config.type != "huggingface":
        raise InputError(
            f"{folder / 'tokenizer'}: a tokenizer of type {old.config.type} cannot grow; only a tokenizer.json "
            "(type huggingface) holds added tokens"
        )
    known = [token for token in tokens if old.token_id(token) is not None]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if not tokens or known or twice or "" in tokens:
        wrong = f"known already: {known}" if known else f"given twice: {twice}" if twice else "empty"
        raise InputError(f"the tokens to add are wrong ({wrong}): give each new token once")
    return old


@torch.no_grad()
def _load_grown(chunk: torch.nn.Module, folder: Path, vocab_size: int, added: tuple[int, list[list[int]]]) -> None:
    """Read the weights; rows of ``vocab_size`` tokens are taken over, those of the new ones from ``added``.

    Args:
        added: the first new id, and for each new token the ids that its rows are the mean of.
    """
    wanted = model_state([chunk])
    grown = [key for key in _ROWS if wanted["model0"].pop(key, None) is not None]
    loaded = load_sharded(wanted, folder / "state")
    for key, rows in read_tensors(folder, grown):
        whole = chunk.get_parameter(key).detach().clone()
        whole.zero_()  # the padding
        whole[:vocab_size] = rows[:vocab_size].float()
        first, pieces = added
        for number, ids in enumerate(pieces):
            whole[first + number] = rows[ids].float().mean(0)
        loaded["model0"][key] = whole
    apply_model_state([chunk], loaded)


def _write_tokenizer(old: HuggingFaceTokenizer, tokens: Sequence[str], folder: Path, special: bool) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    old.save(folder)
    saved = json.loads((folder / TOKENIZER_FILE_NAME).read_text(encoding="utf-8"))
    file = folder / saved["path"]
    backend = Backend.from_file(str(file))
    content = [AddedToken(token, normalized=False, special=special) for token in tokens]
    (backend.add_special_tokens if special else backend.add_tokens)(content)
    ids = [backend.token_to_id(token) for token in tokens]
    assert ids == list(range(old.vocab_size, old.vocab_size + len(tokens))), ids
    backend.save(str(file))
