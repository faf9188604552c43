"""Maps names of other tools to our settings and flags, and suggests what a user meant.

Imports nothing: the command line uses it before it imports anything else.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

KeyPath = tuple[str, ...]
"""("method", "rank")"""

# Better suggestions than the nearest spelling. The names are from examples of Axolotl,
# LLaMA-Factory, TRL, Unsloth, torchtune, mlx-lm and PEFT.
KNOWN_ELSEWHERE = {
    "activation_checkpointing": "checkpointing",
    "activation_offloading": "offload",
    "adapter": "from_adapter",
    "adapter_checkpoint": "from_adapter",
    "adapter_name_or_path": "from_adapter",
    "added_tokens": "new_tokens",
    "additional_target": "method.train_modules",
    "assistant_only_loss": "data.train_on",
    "base_model": "base",
    "batch_size": "batch",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "chat_template_kwargs": "template.variables",
    "clip_grad_norm": "clip",
    "column_mapping": "data.map",
    "columns": "data.map",
    "completion_only_loss": "data.train_on",
    "compute_dtype": "dtype",
    "cutoff_len": "length",
    "data_path": "data",
    "data_seed": "seed",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "dataset_text_field": "data.map",
    "dataset_val": "data.validation",
    "datasets": "data",
    "deepspeed": "shard",
    "device_map": "device",
    "early_stopping_patience": "patience",
    "enable_activation_checkpointing": "checkpointing",
    "enable_activation_offloading": "offload",
    "enable_thinking": "template.variables",
    "eval_data": "data.validation",
    "eval_dataset": "data.validation",
    "eval_file": "data.validation",
    "eval_steps": "evaluate_every",
    "extra_tokens": "new_tokens",
    "field_messages": "data.map",
    "fine_tune_type": "method",
    "full_finetuning": "method",
    "finetuning_type": "method",
    "float16": "dtype",
    "fp16": "dtype",
    "fsdp": "shard",
    "fsdp_config": "shard",
    "grad_checkpoint": "checkpointing",
    "gradient_checkpointing": "checkpointing",
    "gradient_clipping": "clip",
    "group_by_length": "order",
    "hf_dataset": "data",
    "init_lora_weights": "method.init",
    "iters": "steps",
    "layers_to_transform": "method.layers",
    "load_in_4bit": "quantize",
    "lora_alpha": "method.alpha",
    "lora_attn_modules": "method.targets",
    "lora_dropout": "method.dropout",
    "lora_model_dir": "from_adapter",
    "lora_modules_to_save": "method.train_modules",
    "lora_parameters": "method",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lora_target_modules": "method.targets",
    "loraplus_lr_ratio": "method.lr_ratio",
    "lr": "learning_rate",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "mask_prompt": "data.train_on",
    "max_grad_norm": "clip",
    "max_iters": "steps",
    "max_length": "length",
    "max_seq_len": "length",
    "max_seq_length": "length",
    "max_steps": "steps",
    "micro_batch_size": "micro_batch",
    "mixed_precision": "dtype",
    "model": "base",
    "model_id": "base",
    "model_max_length": "length",
    "model_name": "base",
    "model_name_or_path": "base",
    "modules_to_save": "method.train_modules",
    "new_special_tokens": "new_tokens",
    "num_epochs": "epochs",
    "num_iters": "steps",
    "num_layers": "method.layers",
    "num_steps": "steps",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output_dir": "out",
    "peft_config": "method",
    "peft_init_lora_weights": "method.init",
    "peft_layers_to_transform": "method.layers",
    "peft_type": "method",
    "peft_use_dora": "method",
    "peft_use_rslora": "method.rslora",
    "per_device_batch_size": "batch",
    "per_device_train_batch_size": "batch",
    "precision": "dtype",
    "pretrained_model_name_or_path": "base",
    "pure_bf16": "dtype",
    "quantization": "quantize",
    "quantization_bit": "quantize",
    "r": "method.rank",
    "random_seed": "seed",
    "random_state": "seed",
    "report_to": "log",
    "resume_adapter_file": "from_adapter",
    "run_val_every_n_steps": "evaluate_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "seq_len": "length",
    "sequence_len": "length",
    "shuffle": "order",
    "shuffle_dataset": "order",
    "steps_per_eval": "evaluate_every",
    "target_modules": "method.targets",
    "test_datasets": "data.validation",
    "test_size": "data.validation_share",
    "test_split_size": "data.validation_share",
    "torch_dtype": "dtype",
    "total_steps": "steps",
    "train_batch_size": "batch",
    "train_data": "data",
    "train_dataset": "data",
    "train_file": "data",
    "train_files": "data",
    "train_on_input": "data.train_on",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "train_on_responses_only": "data.train_on",
    "train_type": "method",
    "use_dora": "method",
    "use_gradient_checkpointing": "checkpointing",
    "use_rslora": "method.rslora",
    "use_tensorboard": "log",
    "val_set_size": "data.validation_share",
    "val_size": "data.validation_share",
    "valid_data": "data.validation",
    "validation_data": "data.validation",
    "validation_dataset": "data.validation",
    "validation_file": "data.validation",
    "validation_size": "data.validation_share",
    "validation_split": "data.validation_share",
    "warmup_ratio": "warmup",
}
"""Their name -> the path of our setting."""

METHODS_ELSEWHERE = {"dora", "full", "lora", "qlora"}
"""Values with which a name such as Axolotl's `adapter` means the method."""

_NOT_NEEDED = {
    "the attention kernel is chosen by itself": (
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
    "`quantize: gguf` holds 8 bits from a .gguf file in Q8_0, `fp8` from an FP8 folder; "
    "`nf4` makes 4 of any base": ("load_in_8bit"),
    "a stopped run goes on with `veneer train --resume FOLDER`": (
        "auto_resume_from_checkpoints resume resume_from_checkpoint"
    ),
    "a run needs a folder that does not exist yet": "overwrite_output_dir",
    "the base's own chat template is used": "chat_template",
    "the base's files say it": "model_class model_type processor_type tokenizer tokenizer_type",
    "every linear layer is the default of `method.targets`": (
        "apply_lora_to_mlp apply_lora_to_output lora_target_linear"
    ),
    "rows are read and tokenised without settings": (
        "dataloader_num_workers dataset_num_proc dataset_prepared_path overwrite_cache "
        "preprocessing_num_workers remove_unused_columns tokenized_path"
    ),
    "only supervised training is offered: rows with an answer to learn": (
        "rl rl_beta pref_beta pref_loss stage"
    ),
    "the command says it: `veneer train`, `veneer evaluate`": "do_eval do_predict do_train",
    "report.html shows the curves of every run": "plot_loss",
    "`veneer data sample` takes some of the rows": "max_samples max_train_samples",
    "every unknown key is refused": "strict",
    "float32 products keep their precision": "tf32",
    "the base's tokenizer has them; `new_tokens` adds others": "special_tokens",
}
NOT_NEEDED = {name: said for said, names in _NOT_NEEDED.items() for name in names.split()}
"""Their name -> why Veneer has no such setting."""

CHOICES_ELSEWHERE = {
    "4bit": "nf4",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_hf": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "gguf": "llamacpp",
    "hf": "transformers",
    "llama.cpp": "llamacpp",
    "q8": "q8_0",
    "paged_adamw_8bit": "adamw8bit",
    "q4": "q4_k_m",
}
"""Their value of a setting or flag -> ours."""

COMMANDS_ELSEWHERE = {
    "add": "adapters add",
    "apply": "merge",
    "check": "data check",
    "complete": "generate",
    "convert": "data convert",
    "delete": "adapters rm",
    "diff": "adapters diff",
    "eval": "evaluate",
    "finetune": "train",
    "fine-tune": "train",
    "fit": "train",
    "fuse": "merge",
    "help": "--help",
    "infer": "generate",
    "inference": "generate",
    "info": "doctor",
    "list": "adapters ls",
    "ls": "adapters ls",
    "predict": "generate",
    "preprocess": "data check",
    "pull": "adapters pull",
    "push": "adapters push",
    "quantise": "quantize",
    "remove": "adapters rm",
    "resume": "train --resume",
    "rm": "adapters rm",
    "run": "generate",
    "sample": "data sample",
    "server": "serve",
    "sft": "train",
    "show": "adapters show",
    "split": "data split",
    "tag": "adapters tag",
    "test": "evaluate",
    "tune": "train",
    "upload": "adapters push",
    "validate": "data check",
    "verify": "adapters verify",
    "version": "--version",
}
"""Another word for a command -> ours."""

ACTIONS_ELSEWHERE = {
    "cat": "show",
    "clean": "gc",
    "compare": "diff",
    "copy": "add",
    "del": "rm",
    "delete": "rm",
    "download": "pull",
    "info": "show",
    "inspect": "show",
    "list": "ls",
    "mv": "rename",
    "prune": "gc",
    "remove": "rm",
    "save": "add",
    "upload": "push",
    "validate": "check",
    "view": "show",
}
"""Another word for an action of `adapters` or `data` -> ours."""

FLAGS_ELSEWHERE = {
    "device_map": "device",
    "lora": "adapter",
    "lora_path": "adapter",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "o": "out",
    "output": "out",
    "peft_model": "adapter",
    "system_prompt": "system",
    "temp": "temperature",
    "test": "data",
}
"""Their name -> our flag that is not a setting of a run."""


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
