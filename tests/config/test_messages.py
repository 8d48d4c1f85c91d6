"""What a user reads after a mistake: the key, the value, what is allowed, and the fix; every mistake at once."""

import pytest

from nemo_llm.config.compose.catalog import describe_type, known_keys, nearest, nearest_key
from nemo_llm.config.compose.load import compose, decode, to_dict
from nemo_llm.errors import NO_VALUE, ConfigError, Problem


def problems_of(*arguments: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(arguments))
    return {problem.key: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("argument", "key", "shown"),
    [
        ("trainer.max_step=5", "trainer.max_step", ["5", "no such key", "did you mean trainer.max_steps"]),
        ("optim.learning_rate=1", "optim.learning_rate", ["no such key"]),
        ("tensor_model_parallel_size=2", "tensor_model_parallel_size", ["parallelism.tensor_model_parallel_size"]),
        ("traner.max_steps=5", "traner", ["no such key", "did you mean trainer"]),
        ("modle=gpt_tiny", "modle", ["did you mean model"]),
        ("cluster=b200", "cluster", ["b200", "no such choice", "set cluster.gpu_name, cluster.gpu_memory_gib"]),
        ("optim.sched.warmup=3", "optim.sched.warmup", ["did you mean optim.sched.warmup_steps"]),
        ("+model.hidden_sizes=3", "model.hidden_sizes", ["3", "did you mean model.hidden_size"]),
        ("trainer.max_steps=10.0", "trainer.max_steps", ["10.0", "whole number", "trainer.max_steps=10"]),
        ("trainer.max_steps=ten", "trainer.max_steps", ["'ten'", "whole number above 0"]),
        ("trainer.max_steps=0", "trainer.max_steps", ["0", "above 0"]),
        ("trainer.max_steps=null", "trainer.max_steps", ["None", "whole number"]),
        ("optim.lr='3e-4'", "optim.lr", ["'3e-4'", "without quotes", "0.0003"]),
        ("optim.adam_beta1=1.5", "optim.adam_beta1", ["1.5", "of at least 0 and below 1"]),
        ("trainer.check_only=maybe", "trainer.check_only", ["'maybe'", "true or false"]),
        ("trainer.check_only=1", "trainer.check_only", ["1", "true or false"]),
        ("model.normalization=rmsnorm", "model.normalization", ["'rmsnorm'", "RMSNorm, LayerNorm", "did you mean"]),
        ("precision.params_dtype=int8", "precision.params_dtype", ["'int8'", "bf16, fp16, fp32"]),
        ("trainer.accelerator=gpu", "trainer.accelerator", ["did you mean trainer.accelerator=cuda"]),
        ("data.tokenizer=gpt2", "data.tokenizer", ["its group: tokenizer=gpt2"]),
        ("optim.sched=wsd", "optim.sched", ["its group: optim/sched=wsd"]),
        ("peft=ia3 peft.rank=4", "peft.rank", ["4", "kind ia3 has no such key", "target_modules"]),
        ("peft=lora peft.num_virtual_tokens=8", "peft.num_virtual_tokens", ["8", "kind lora has no such key"]),
        ("peft=lora peft.rang=4", "peft.rang", ["4", "did you mean peft.rank?"]),
        ("peft=lora peft.kind=loar", "peft.kind", ["'loar'", "lora, dora, ia3, adapter", "did you mean lora?"]),
        (
            "peft=p_tuning peft.kind=prompt_tuning",
            "peft.encoder_hidden_size",
            ["kind prompt_tuning has no such key", "which peft=prompt_tuning chooses"],
        ),
        ("peft.rank=4", "peft.kind", ["missing", "choose peft=<lora|dora|ia3|adapter|prompt_tuning|p_tuning>"]),
        ("data.blend=[true, x]", "data.blend[0].path", ["True", "must be text"]),
        ("peft=lora peft.target_modules=[]", "peft", ["target_modules is empty"]),
        ("data.split=5", "data", ["split '5'", "two or three shares"]),
        ("data.split=abc", "data", ["'abc'", "numbers and commas"]),
        ("data.blend=[{name: a, weigth: 1.0}]", "data.blend[0].weigth", ["1.0", "did you mean weight"]),
        ("data.blend=[{name: a, prefix: x, weight: -1.0}]", "data.blend[0].weight", ["-1.0", "at least 0"]),
        ("model.mcore_overrides={a: [1]}", "model.mcore_overrides.a", ["[1]", "true or false"]),
        ("rlhf=ppo", "rlhf", ["'ppo'"]),
        ("~trainer.max_steps", "trainer.max_steps", ["missing", "add trainer.max_steps="]),
        ("model.num_layers=???", "model.num_layers", ["no value yet", "add model.num_layers="]),
        ("parallelism=tp3", "parallelism", ["'tp3'", "tp2_pp2", "did you mean parallelism=tp"]),
        ("optim/sched=wds", "optim/sched", ["'wds'", "did you mean optim/sched=wsd"]),
        ("sched=wsd", "sched", ["no such key"]),
        ("optim/schedule=wsd", "optim/schedule", ["no such group", "optim/sched"]),
        ("trainer={max_steps: 3}", "trainer", ["must be one of default", "trainer.<key>=<value>"]),
        ("optim.lr=1,2", "optim.lr", ["1,2", "one value"]),
        ("optim.lr=[", "optim.lr", ["'['", "a number above 0"]),
        ("max_steps", "", ["'max_steps'", "key=value", "trainer.max_steps"]),
        ("precision=fp32", "precision", ["chosen twice", "bf16"]),
        ('run.name="${nowhere}"', "", ["nowhere", "not found"]),
        ("data.tokenizer.path=null", "data.tokenizer", ["path is null"]),
        ("task.name=clasification", "task.name", ["'clasification'", "did you mean classification"]),
        ("~task.name", "task.name", ["missing", "one of pretrain, sft, classification, score"]),
        ("task.name=score", "task.z_loss_coeff", ["0.0", "name score has no such key", "which task=score chooses"]),
        (
            "task.z_loss_coef=0.1",
            "task.z_loss_coef",
            ["name pretrain has no such key", "did you mean task.z_loss_coeff"],
        ),
    ],
)
def test_mistake_names_key_value_and_fix(argument: str, key: str, shown: list[str]) -> None:
    before = ["precision=bf16"] if argument.startswith("precision=fp32") else []
    peft = argument.split(" ") if argument.startswith("peft=") else [argument]
    found = problems_of("+model=gpt_tiny", *before, *peft)
    assert list(found) == [key]
    for text in shown:
        assert text in found[key]


def test_all_mistakes_are_reported_at_once() -> None:
    found = problems_of("+model=gpt_tny", "parallelism=tp3", "trainer.max_step=5", "optim.lr=-1", "optim/sched=wds")
    assert set(found) == {"model", "parallelism", "trainer.max_step", "optim.lr", "optim/sched"}


def test_missing_model_lists_the_choices() -> None:
    found = problems_of("trainer.max_step=5")
    assert "no model chosen" in found["model"]
    assert "+model=<" in found["model"]
    assert "gpt_tiny" in found["model"]
    assert "gpt_175b" in found["model"]
    assert "family" not in found["model"]
    assert set(found) == {"model", "trainer.max_step"}


def test_message_counts_and_numbers_the_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["+model=gpt_tiny", "optim.lr=-1", "trainer.seed=-1"])
    text = str(caught.value)
    assert text.startswith("2 problems in the configuration:")
    assert "  1. " in text
    assert "  2. " in text
    assert "Traceback" not in text
    assert "pydantic" not in text


def test_decode_of_a_saved_mapping_names_missing_and_unknown_keys() -> None:
    mapping = to_dict(compose(["+model=gpt_tiny"]))
    del mapping["optim"]["lr"]
    mapping["optim"]["rl"] = 0.1
    mapping["trainer"] = 3
    with pytest.raises(ConfigError) as caught:
        decode(mapping)
    assert {problem.key for problem in caught.value.problems} == {"optim.lr", "optim.rl", "trainer"}


def test_whole_numbers_do_for_floats_and_floats_not_for_whole_numbers() -> None:
    cfg = compose(["+model=gpt_tiny", "optim.weight_decay=0", "optim.lr=1"])
    assert (cfg.optim.weight_decay, cfg.optim.lr) == (0.0, 1.0)
    assert isinstance(cfg.optim.lr, float)


def test_nearest_key_prefers_the_same_section() -> None:
    keys = known_keys()
    assert nearest_key("trainer.max_step", keys) == "trainer.max_steps"
    assert nearest_key("model.lr", keys) == "optim.lr"
    assert nearest_key("zzzz.qqqq", keys) is None
    assert nearest("RMSNORM", ["LayerNorm", "RMSNorm"]) == "RMSNorm"


def test_descriptions_of_types() -> None:
    keys = known_keys()
    assert keys["trainer.max_steps"].description == "a whole number above 0"
    assert keys["trainer.devices"].description == "a whole number above 0, or null"
    assert keys["precision.params_dtype"].description == "one of bf16, fp16, fp32"
    assert describe_type(type(None)) == "null"


def test_problem_shows_its_value_and_cuts_long_ones() -> None:
    text = str(Problem("a.b", "x" * 1000, "must be short", "shorten it"))
    assert text.startswith("a.b = 'xxx")
    assert len(text) < 300
    assert str(Problem("a.b", NO_VALUE, "missing", "add it")).startswith("a.b: missing")
    assert "None" in str(Problem("a.b", None, "must be a number", "write one"))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
@pytest.mark.parametrize(
    "key",
    ["optim.lr", "optim.clip_grad", "model.moe.moe_z_loss_coeff", "model.mcore_overrides.moe_expert_capacity_factor"],
)
def test_numbers_without_end_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["+model=moe_tiny", f"{key}={value}"])
    assert [(problem.key, problem.rule) for problem in caught.value.problems] == [(key, "must be a finite number")]
