"""A small random Llama of transformers' with a tokenizer, its import, and lm-eval over both."""

import json
from pathlib import Path
from typing import Any


def make_hf_model(folder: Path) -> None:
    """A random model that looks at its context, with the shipped tokenizer of 2,048 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import nemo_llm

    assets = Path(nemo_llm.__file__).parent / "assets" / "tokenizers" / "demo" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(assets), eos_token="<|endoftext|>", bos_token=None)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def import_model(folder: str) -> None:
    """Convert ``hf`` below the folder to ``ours``, on one rank."""
    from nemo_llm.config.commands.convert import ConvertConfig
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.convert.convert import convert

    arguments = ["source_format=hf", "target_format=nemo_llm", f"input={folder}/hf", f"output={folder}/ours"]
    convert(compose_tool("convert_checkpoint", ConvertConfig, arguments))


def write_task_files(folder: Path) -> dict[str, str]:
    """A few examples of every kind of task."""
    words = ["whale", "sea", "ship", "captain", "harpoon", "storm", "deck", "mast"]
    texts = [
        f"The {a} saw the {b} and the old {c} of the {d}"
        for a, b, c, d in zip(*[words[i:] for i in range(4)], strict=False)
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "lambada": [{"text": text} for text in texts],
        "blimp": [{"sentence_good": f"The {w}s are old.", "sentence_bad": f"The {w}s is old."} for w in words],
        "gsm8k": [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(3)],
        "arc": [
            {"question": f"Where is a {w}?", "choices": {"text": words[:3], "label": ["A", "B", "C"]}, "answerKey": "B"}
            for w in words
        ],
        "hellaswag": [
            {
                "activity_label": "Sailing",
                "ctx_a": f"A {w} comes near.",
                "ctx_b": "the men [header] then",
                "endings": ["row away.", "sing [title] loudly.", f"see the {w}.", "sleep."],
                "label": i % 4,
            }
            for i, w in enumerate(words)
        ],
    }
    files = {}
    for kind, records in rows.items():
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        files[kind] = str(path)
    table = folder / "mmlu.csv"
    table.write_text(
        "".join(f'"Which is a {w}, or not?",{",".join(words[:4])},{"ABCD"[i % 4]}\n' for i, w in enumerate(words))
    )
    return {**files, "mmlu": str(table)}


def plain_results(results: dict[str, Any]) -> dict[str, Any]:
    """Figures, and every example's answers, of what lm-eval returned."""
    samples = {
        task: [[sample["doc_id"], sample["filter"], sample["resps"]] for sample in rows]
        for task, rows in results["samples"].items()
    }
    figures = {
        task: {key: value for key, value in row.items() if isinstance(value, float)}
        for task, row in results["results"].items()
    }
    return {"figures": figures, "samples": samples}


def run_ours(folder: str, files: dict[str, str], *overrides: str) -> dict[str, Any]:
    """lm-eval through our model on these ranks."""
    from nemo_llm.evaluation.harness import build_lm, evaluate, find_task_files
    from nemo_llm.inference.scoring import ModelScorer
    from tests.inference.world import load

    _, model = load(f"{folder}/ours", *overrides)
    scorer = ModelScorer(model, 4)
    return plain_results(evaluate(build_lm(scorer), find_task_files(files, {}), None, None))


def run_theirs(folder: str, files: dict[str, str]) -> dict[str, Any]:
    """lm-eval through its own Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM

    from nemo_llm.evaluation.harness import evaluate, find_task_files

    lm = HFLM(pretrained=f"{folder}/hf", device="cpu", dtype="float32", batch_size=4, max_length=512)
    return plain_results(evaluate(lm, find_task_files(files, {}), None, None))


def hf_greedy(folder: str, texts: list[str], num_tokens: int) -> list[list[int]]:
    """Greedy tokens by ``transformers.generate``, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/hf")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32)
    results = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        results.append(output[0, ids["input_ids"].shape[1] :].tolist())
    return results


def our_greedy(folder: str, texts: list[str], num_tokens: int, batch_size: int) -> list[list[int]]:
    """The same by our model."""
    from nemo_llm.inference.decoder import generate
    from tests.inference.world import load

    cfg, model = load(f"{folder}/ours", f"sampling.max_new_tokens={num_tokens}", "sampling.ignore_eod=true")
    prompts = [model.tokenizer.encode(text) for text in texts]
    return [result.tokens for result in generate(model, prompts, cfg.sampling, batch_size)]
