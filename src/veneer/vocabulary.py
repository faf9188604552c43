"""Maps names of other tools to our settings and flags, and suggests what a user meant.

Imports nothing of Veneer: the command line reads it before anything else.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

KeyPath = tuple[str, ...]
"""("method", "rank")"""


def _by_name(table: str) -> dict[str, str]:
    """Reads lines `ours: name name ...` (further names may follow on lines without a colon) as
    {name: ours}."""
    ours, names = "", dict[str, str]()
    for line in table.splitlines():
        word, colon, rest = line.partition(": ")
        ours = word.strip() if colon else ours
        names |= dict.fromkeys((rest if colon else line).split(), ours)
    return names


# Better suggestions than the nearest spelling. The names are from examples of Axolotl,
# LLaMA-Factory, TRL, Unsloth, torchtune, mlx-lm and PEFT.
KNOWN_ELSEWHERE = _by_name(
    """
    base: base_model model model_id model_name model_name_or_path pretrained_model_name_or_path
    batch: batch_size per_device_batch_size per_device_train_batch_size train_batch_size
    checkpointing: activation_checkpointing enable_activation_checkpointing grad_checkpoint
        gradient_checkpointing use_gradient_checkpointing
    clip: clip_grad_norm gradient_clipping max_grad_norm
    data: data_path dataset dataset_name dataset_path datasets hf_dataset train_data
        train_dataset train_file train_files
    data.map: column_mapping columns dataset_text_field field_messages
    data.train_on: assistant_only_loss completion_only_loss mask_prompt train_on_input
        train_on_inputs train_on_prompt train_on_responses_only
    data.validation: dataset_val eval_data eval_dataset eval_file test_datasets valid_data
        validation_data validation_dataset validation_file
    data.validation_share: test_size test_split_size val_set_size val_size validation_size
        validation_split
    device: device_map
    dtype: bf16 bfloat16 compute_dtype float16 fp16 mixed_precision precision pure_bf16
        torch_dtype
    epochs: num_epochs num_train_epochs
    evaluate_every: eval_steps run_val_every_n_steps steps_per_eval
    from_adapter: adapter adapter_checkpoint adapter_name_or_path lora_model_dir
        resume_adapter_file
    keep: save_total_limit
    learning_rate: lr
    length: cutoff_len max_length max_seq_len max_seq_length model_max_length seq_len
        sequence_len
    log: report_to use_tensorboard
    method: fine_tune_type full_finetuning finetuning_type lora_parameters peft_config peft_type
        peft_use_dora train_type use_dora
    method.alpha: lora_alpha
    method.dropout: lora_dropout
    method.init: init_lora_weights peft_init_lora_weights
    method.layers: layers_to_transform num_layers peft_layers_to_transform
    method.lr_ratio: loraplus_lr_ratio
    method.rank: lora_r lora_rank r
    method.rslora: peft_use_rslora use_rslora
    method.targets: lora_attn_modules lora_target lora_target_modules target_modules
    method.train_modules: additional_target lora_modules_to_save modules_to_save
    micro_batch: micro_batch_size
    new_tokens: added_tokens extra_tokens new_special_tokens
    offload: activation_offloading enable_activation_offloading
    optimizer: optim
    order: group_by_length shuffle shuffle_dataset
    out: output_dir
    patience: early_stopping_patience
    quantize: load_in_4bit quantization quantization_bit
    save_every: save_steps
    schedule: lr_schedule lr_scheduler lr_scheduler_type
    seed: data_seed random_seed random_state
    shard: deepspeed fsdp fsdp_config
    steps: iters max_iters max_steps num_iters num_steps total_steps
    template.variables: chat_template_kwargs enable_thinking
    warmup: warmup_ratio
"""
)
"""Names of settings in other tools -> the path of our setting."""

METHODS_ELSEWHERE = {"dora", "full", "lora", "qlora"}
"""Values with which a name such as Axolotl's `adapter` names the method."""

_NOT_NEEDED = {
    "Veneer chooses the attention kernel": (
        "attn_implementation flash_attention flash_attn sdp_attention xformers_attention"
    ),
    "rows are always packed, without padding": (
        "eval_sample_packing packed packing pad_to_max_length pad_to_sequence_len padding_free"
        " sample_packing"
    ),
    "layers are fused wherever the result stays the same": (
        "compile liger_fused_linear_cross_entropy liger_glu_activation liger_layer_norm "
        "liger_rms_norm liger_rope torch_compile use_kernels"
    ),
    "`batch` is the number of rows of an optimizer step, `micro_batch` of those computed at once": (
        "grad_accumulation_steps gradient_accumulation_steps"
    ),
    "`warmup` is a share of the steps, by default 0.03": "num_warmup_steps warmup_steps",
    "`evaluate_every` counts steps; by default a run has five evaluations": (
        "eval_strategy evals_per_epoch evaluation_strategy"
    ),
    "`save_every` counts steps; by default every evaluation saves a checkpoint": (
        "save_strategy saves_per_epoch"
    ),
    "every step is recorded in metrics.jsonl": "log_every_n_steps logging_steps steps_per_report",
    "`log: [wandb]` sends the records, and variables such as WANDB_PROJECT say where to": (
        "project_name run_name wandb_entity wandb_log_model wandb_name wandb_project wandb_run_id"
        " wandb_watch"
    ),
    "code that comes with a model is never run": "trust_remote_code",
    "`quantize: gguf` keeps 8 bits of a .gguf file in Q8_0, `fp8` those of an FP8 folder; "
    "`nf4` makes 4 bits of any base": ("load_in_8bit"),
    "`veneer train --resume FOLDER` continues a stopped run": (
        "auto_resume_from_checkpoints resume resume_from_checkpoint"
    ),
    "a run needs a folder that does not exist yet": "overwrite_output_dir",
    "the base's own chat template is used": "chat_template",
    "the base's files define it": "model_class model_type processor_type tokenizer tokenizer_type",
    "`method.targets` is every linear layer by default": (
        "apply_lora_to_mlp apply_lora_to_output lora_target_linear"
    ),
    "rows are read and tokenised without settings": (
        "dataloader_num_workers dataset_num_proc dataset_prepared_path overwrite_cache "
        "preprocessing_num_workers remove_unused_columns tokenized_path"
    ),
    "only supervised training is offered: rows with an answer to learn": (
        "rl rl_beta pref_beta pref_loss stage"
    ),
    "the command decides it: `veneer train`, `veneer evaluate`": "do_eval do_predict do_train",
    "report.html shows the curves of every run": "plot_loss",
    "`veneer data sample` takes some of the rows": "max_samples max_train_samples",
    "every unknown key is refused": "strict",
    "float32 products keep their precision": "tf32",
    "the base's tokenizer has them; `new_tokens` adds others": "special_tokens",
}
NOT_NEEDED = {name: reason for reason, names in _NOT_NEEDED.items() for name in names.split()}
"""Names of settings in other tools -> why Veneer does not need them."""

CHOICES_ELSEWHERE = _by_name(
    """
    adamw: adamw_hf adamw_torch adamw_torch_fused
    adamw8bit: adamw_8bit adamw_bnb_8bit paged_adamw_8bit
    bfloat16: bf16
    float16: fp16
    float32: fp32
    llamacpp: gguf llama.cpp
    nf4: 4bit
    q4_k_m: q4
    q8_0: q8
    transformers: hf
"""
)
"""Values of settings and flags in other tools -> ours."""

COMMANDS_ELSEWHERE = _by_name(
    """
    --help: help
    --version: version
    adapters add: add
    adapters diff: diff
    adapters ls: list ls
    adapters pull: pull
    adapters push: push upload
    adapters rm: delete remove rm
    adapters show: show
    adapters tag: tag
    adapters verify: verify
    data check: check preprocess validate
    data convert: convert
    data sample: sample
    data split: split
    doctor: info
    evaluate: eval test
    generate: complete infer inference predict run
    merge: apply fuse
    quantize: quantise
    serve: server
    train: finetune fine-tune fit sft
    train --resume: resume
"""
)
"""Other words for a command -> ours."""

ACTIONS_ELSEWHERE = _by_name(
    """
    add: copy save
    check: validate
    diff: compare
    gc: clean prune
    ls: list
    pull: download
    push: upload
    rename: mv
    rm: del delete remove
    show: cat info inspect view
"""
)
"""Other words for an action of `adapters` or `data` -> ours."""

FLAGS_ELSEWHERE = _by_name(
    """
    adapter: lora lora_path peft_model
    data: test
    device: device_map
    max_new_tokens: max_length max_tokens n_predict
    out: o output
    system: system_prompt
    temperature: temp
"""
)
"""Names of flags in other tools -> our flag that is not a setting of a run."""


LEAST_SIMILARITY = 0.65
"""difflib's least ratio for a suggestion."""


def nearest_word(
    word: str, known: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Suggests a known word for an unknown one: another tool's word, or a similar spelling."""
    words = list(known)
    if (ours := elsewhere.get(word.lower())) in words:
        return ours
    return next(iter(get_close_matches(word.lower(), words, n=1, cutoff=LEAST_SIMILARITY)), None)


def nearest(unknown: KeyPath, ours: Iterable[KeyPath], value: object = None) -> KeyPath | None:
    """Suggests a valid setting for an unknown name.

    In order: another tool's name for it, a similar spelling at the same level, the same name at
    another level, a less similar spelling. value: the value of the unknown setting
    """
    paths = list(ours)
    *parent, key = unknown
    if (
        KNOWN_ELSEWHERE.get(key) == "from_adapter"
        and isinstance(value, str)
        and value in METHODS_ELSEWHERE
    ):
        key = "method" if ("method",) in paths else "name"
    for table in (KNOWN_ELSEWHERE, FLAGS_ELSEWHERE):
        known = tuple(table[key].split(".")) if key in table else ()
        for path in [path for path in paths if path == known] + [
            path for path in paths if path[-1:] == known[-1:]
        ]:
            return path
    siblings = {path[-1]: path for path in paths if list(path[:-1]) == parent}
    for name in get_close_matches(key, siblings, n=1, cutoff=0.8):
        return siblings[name]
    for path in paths:
        if path[-1] == key:
            return path
    for name in get_close_matches(key, siblings, n=1, cutoff=LEAST_SIMILARITY):
        return siblings[name]
    return None
