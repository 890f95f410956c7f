"""What TRL, Transformers, axolotl, Unsloth and LLaMA-Factory call an option or a command.

No other names of ours, which ``aliases`` are: here a value is written otherwise, or means another
thing, so whoever writes one is told what to write.
"""

from __future__ import annotations

from collections.abc import Collection

_HERE = {
    # ours: theirs
    "model": "model_name_or_path base_model model_name model_id pretrained_model_name_or_path",
    "data": "dataset dataset_name datasets dataset_path data_path train_file train_data",
    "validation_data": "validation_file val_data valid_data eval_dataset val_set_size val_size "
    "test_datasets load_best_model_at_end",
    "eval_data": "test_file test_data",
    "storage nf4": "load_in_4bit use_4bit quantization_bit bnb_4bit_quant_type",
    "storage int8": "load_in_8bit use_8bit",
    "compute_dtype": "bf16 fp16 torch_dtype dtype bnb_4bit_compute_dtype",
    "method qlora": "qlora use_qlora",
    "method lora": "lora use_lora",
    "method": "finetuning_type peft_type use_peft adapter",
    "adapter": "adapter_name_or_path adapter_path lora_path lora_model_dir peft_model_id",
    "rank": "r lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target lora_target_modules lora_target_linear",
    "max_length": "max_seq_length max_seq_len model_max_length sequence_len seq_len cutoff_len",
    "template": "prompt_template chat_template",
    "packing on": "sample_packing",
    "batch_size": "micro_batch_size train_batch_size per_device_eval_batch_size",
    "epochs": "num_epochs epoch",
    "max_steps": "num_steps steps iters",
    "warmup_ratio": "warmup_steps",
    "schedule": "lr_scheduler scheduler",
    "optim": "optimizer",
    "activation_checkpointing": "use_gradient_checkpointing",
    "eval_steps": "eval_strategy evaluation_strategy eval_interval",
    "metric": "metric_for_best_model",
    "save_steps": "save_strategy save_interval",
    "report_to wandb": "use_wandb wandb_project",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "overwrite": "overwrite_output_dir",
    "push_to_hub USER/NAME": "hub_model_id",
    # commands
    "train": "finetune fine_tune sft",
    "evaluate": "eval score",
    "generate": "inference infer predict ask",
    "plan": "fit fits estimate",
    "ui": "webui webchat gui",
    "evaluate --lm-eval TASKS": "lm_eval harness benchmark",
    "train --push-to-hub USER/NAME, or hf upload USER/NAME DIR/adapter": "push push_to_hub upload",
    "train --storage nf4 (or int8), which quantizes the base as it is loaded": "quantize quant",
}

_PAGE = "of which the documentation has a page"
_NOT_HERE = {
    f"PEFT's merge_and_unload, for lora and qlora, {_PAGE}": "merge merge_lora export gguf convert",
    "train, which prepares rows itself; data FILE --model MODEL shows them": "preprocess tokenize",
    "vLLM or SGLang, for lora and qlora adapters; for others generate, chat and ui": "serve api "
    "vllm_serve deploy",
    f"TRL's trainers with ReftConfig, {_PAGE}": "dpo kto orpo grpo rloo ppo reward rm",
}
"""What does that for which there is no command here, and what the command is called elsewhere."""


def here(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Return what to write instead of each name that another trainer gives to an option.

    Args:
        names: As they were written, with or without hyphens in front.
        known: What the command has, written in the same way; what is none of it is not advised.
    """
    bare = {word.lstrip("-").replace("-", "_"): word for word in known}
    found: dict[str, str] = {}
    for written in names:
        name = written.lstrip("-").replace("-", "_")
        for ours, theirs in _HERE.items():
            option, *value = ours.split()
            if name in theirs.split() and option in bare:
                found.setdefault(written, " ".join([bare[option], *value]))
        for ours, theirs in _NOT_HERE.items():
            if name in theirs.split() and "train" in bare:  # of commands
                found.setdefault(written, ours)
    return found
