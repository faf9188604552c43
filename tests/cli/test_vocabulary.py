"""A run file, a flag or a command of another tool is refused with what it is called here."""

import re

import pytest
import yaml

from veneer.adapters.config import METHODS
from veneer.cli.config_file import list_setting_paths, read_run_config
from veneer.cli.main import COMMANDS, main
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.vocabulary import ACTIONS_ELSEWHERE, COMMANDS_ELSEWHERE, KNOWN_ELSEWHERE, NOT_NEEDED

NEEDED = {"base": "b", "data": "d.jsonl", "out": "o"}

# The keys that the tools' own examples have most often: Axolotl 067b021, LLaMA-Factory ff6d4d1,
# mlx-lm d78bf58, torchtune bd2a0fc, TRL f2cd577, Unsloth 015bdef.
AXOLOTL = """
base_model model_type load_in_8bit load_in_4bit datasets val_set_size output_dir adapter
lora_model_dir sequence_len
sample_packing eval_sample_packing pad_to_sequence_len lora_r lora_alpha lora_dropout
lora_target_modules
lora_target_linear lora_modules_to_save wandb_project wandb_entity wandb_watch wandb_name
wandb_log_model
gradient_accumulation_steps micro_batch_size num_epochs lr_scheduler bf16 fp16 tf32
gradient_checkpointing
resume_from_checkpoint logging_steps attn_implementation flash_attention warmup_ratio warmup_steps
evals_per_epoch
saves_per_epoch special_tokens dataset_prepared_path chat_template tokenizer_type trust_remote_code
strict fsdp
deepspeed max_steps save_steps eval_steps train_on_inputs save_total_limit max_grad_norm
group_by_length
early_stopping_patience rl activation_offloading
"""
LLAMA_FACTORY = """
model_name_or_path trust_remote_code stage do_train finetuning_type lora_rank lora_alpha
lora_dropout lora_target
dataset cutoff_len max_samples overwrite_cache preprocessing_num_workers dataloader_num_workers
output_dir logging_steps
save_steps plot_loss overwrite_output_dir report_to per_device_train_batch_size
gradient_accumulation_steps
num_train_epochs lr_scheduler_type warmup_ratio bf16 resume_from_checkpoint eval_dataset val_size
eval_steps flash_attn
adapter_name_or_path quantization_bit max_steps loraplus_lr_ratio pref_beta pref_loss
"""
MLX_LM = """
model train fine_tune_type data_path num_layers batch_size iters steps_per_report steps_per_eval
resume_adapter_file
max_seq_length grad_checkpoint lora_parameters lr_schedule hf_dataset grad_accumulation_steps
mask_prompt project_name
"""
TORCHTUNE = """
output_dir lora_attn_modules apply_lora_to_mlp apply_lora_to_output lora_rank lora_alpha
lora_dropout tokenizer
max_seq_len dataset batch_size lr lr_scheduler num_warmup_steps gradient_accumulation_steps
clip_grad_norm compile
enable_activation_checkpointing enable_activation_offloading log_every_n_steps packed dataset_val
run_val_every_n_steps
shuffle
"""
TRL_AND_UNSLOTH = """
model_name max_seq_length load_in_4bit r target_modules lora_alpha lora_dropout
use_gradient_checkpointing random_state
use_rslora modules_to_save init_lora_weights layers_to_transform dataset_text_field packing optim
completion_only_loss
assistant_only_loss use_dora lora_r lora_target_modules torch_dtype max_length
per_device_train_batch_size
num_train_epochs dataset_name device_map full_finetuning
"""
TOOLS = {
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "mlx-lm": MLX_LM,
    "torchtune": TORCHTUNE,
}
TOOLS |= {"trl, unsloth": TRL_AND_UNSLOTH}


def refusal(tmp_path, settings):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**NEEDED, **settings}, sort_keys=False))
    with pytest.raises(ConfigError) as refused:
        read_run_config(tmp_path / "run.yaml", {})
    return refused.value


@pytest.mark.parametrize("keys", TOOLS.values(), ids=TOOLS)
def test_every_key_of_another_tools_examples_is_refused_with_what_to_do(keys, tmp_path):
    names = keys.split()
    refused = refusal(tmp_path, dict.fromkeys(names, "x"))
    assert len(refused.faults) == len(names)
    said = {re.search(r"unknown key '(\w+)'", fault)[1]: fault for fault in refused.faults}
    assert said.keys() == set(names)
    without = [
        name for name, fault in said.items() if not re.search(r"did you mean|remove it", fault)
    ]
    assert not without


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("val_set_size", 0.1, "did you mean 'data.validation_share'?"),
        ("sequence_len", 2048, "did you mean 'length'?"),
        ("adapter", "qlora", "did you mean 'method'?"),
        ("adapter", "runs/one", "did you mean 'from_adapter'?"),
        ("adapter", ["one", "two"], "did you mean 'from_adapter'?"),
        ("lora_model_dir", "runs/one", "did you mean 'from_adapter'?"),
        ("sample_packing", True, "remove it (rows are always packed, without padding)"),
        ("qwertz", 1, "unknown key 'qwertz'"),
    ],
)
def test_a_key_is_told_with_what_it_is_called_here(key, value, hint, tmp_path):
    (fault,) = refusal(tmp_path, {key: value}).faults
    assert fault.endswith(hint)


def test_many_unknown_keys_take_a_line_each(tmp_path):
    refused = refusal(tmp_path, dict.fromkeys(["qwertz", "azerty", "xyzzy", "plugh"], 1))
    assert max(map(len, refused.faults)) < 200


def test_a_choice_of_another_tool_is_told_with_ours(tmp_path):
    (fault,) = refusal(tmp_path, {"optimizer": "adamw_bnb_8bit"}).faults
    assert fault.endswith("not one of 'adamw' or 'adamw8bit': did you mean 'adamw8bit'?")


def test_no_name_of_ours_is_taken_for_another_tools():
    ours = {*RunConfig.model_fields, *(path[-1] for path in list_setting_paths())}
    assert not (KNOWN_ELSEWHERE.keys() | NOT_NEEDED.keys()) & ours
    assert not KNOWN_ELSEWHERE.keys() & NOT_NEEDED.keys()
    assert not COMMANDS_ELSEWHERE.keys() & COMMANDS.keys()
    assert {meant.split()[0] for meant in COMMANDS_ELSEWHERE.values()} - {
        "--help",
        "--version",
    } <= COMMANDS.keys()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("list", "unknown command 'list': did you mean `veneer adapters ls`?"),
        ("EVAL", "did you mean `veneer evaluate`?"),
        ("trian", "did you mean `veneer train`?"),
        ("qwertz", "unknown command 'qwertz'\n"),
        ("adapters list", "unknown action list: did you mean ls?"),
        ("adapters remove x", "unknown action remove: did you mean rm?"),
        ("data validate", "unknown action validate: did you mean check?"),
        ("data qwertz", "unknown action qwertz: one of check, convert"),
        ("train --adapter lora", "--adapter: did you mean --method?"),
        (
            "train --gradient-accumulation-steps 4",
            "--gradient-accumulation-steps: remove it (`batch` is",
        ),
    ],
)
def test_a_command_of_another_tool_is_told_with_ours(typed, said, capsys):
    assert main(typed.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("word", [*COMMANDS_ELSEWHERE, *ACTIONS_ELSEWHERE])
def test_a_word_for_a_command_leads_to_one_that_is_there(word, capsys):
    meant = COMMANDS_ELSEWHERE.get(word) or next(
        f"{command} {ACTIONS_ELSEWHERE[word]}"
        for command in ("adapters", "data")
        if main([command, ACTIONS_ELSEWHERE[word], "--help"]) == 0
    )
    words = meant.split()[:2] if meant.split()[0] in ("adapters", "data") else meant.split()[:1]
    assert main([*words, *(["--help"] if not meant.startswith("--") else [])]) == 0


def test_whoever_asks_for_8_bits_is_told_the_formats_that_hold_them(tmp_path):
    (fault,) = refusal(tmp_path, {"load_in_8bit": True}).faults
    assert "gguf" in fault and "fp8" in fault and "not offered" not in fault


def test_the_help_of_the_method_names_every_method():
    told = RunConfig.model_fields["method"].description
    assert all(re.search(rf"\b{name}\b", told) for name in METHODS)
