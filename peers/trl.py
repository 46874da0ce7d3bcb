"""TRL (pip install trl): its trainers on our models and records."""

import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental import cpo, orpo

from training import toybox

# ChatML that marks what the assistant says
CHATML_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


QUIETLY = dict(
    optim="adamw_torch",
    report_to="none",
    bf16=False,
    save_strategy="no",
    logging_steps=10**6,
    gradient_checkpointing=False,
    use_cpu=True,
    disable_tqdm=True,
)


def sft_trainer_speed(folder, talks, rows, context, steps):
    """SFTTrainer's conversations a second on the CPU, start-up not counted.

    folder: a chat model of ours; talks: lists of messages; rows: conversations a step."""
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template = CHATML_GENERATION
    tok.pad_token = tok.pad_token or "<|im_end|>"
    config = SFTConfig(
        output_dir=f"{folder}/trl",
        max_steps=steps,
        per_device_train_batch_size=rows,
        max_length=context,
        assistant_only_loss=True,
        **QUIETLY,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        config,
        train_dataset=Dataset.from_list([{"messages": messages} for messages in talks]),
        processing_class=tok,
    )
    return trainer.train().metrics["train_samples_per_second"]


def preference_trainer(kind, policy, tok, out, ref=None, **settings):
    """TRL's trainer of one kind, DPO, CPO or ORPO, around model folders, with a data set that only
    its constructor sees: its compute_loss is called with batches of ours."""
    trainers = {
        "DPO": (DPOTrainer, DPOConfig),
        "CPO": (cpo.CPOTrainer, cpo.CPOConfig),
        "ORPO": (orpo.ORPOTrainer, orpo.ORPOConfig),
    }
    trainer, config = trainers[kind]
    args = config(
        output_dir=str(out),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        **settings,
    )
    data = {"prompt": ["a"] * 4, "chosen": ["b"] * 4, "rejected": ["a b"] * 4}
    reference = {"ref_model": AutoModelForCausalLM.from_pretrained(ref)} if ref else {}
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tok,
        **reference,
    )


def dpo_trainer_speed(folder, preferences, steps):
    """DPOTrainer's pairs a second on the CPU, in steps of 32, 8 at a time; start-up and the
    reference's log-probs are not counted.

    folder: a chat model of ours; preferences: dpo.Preferences"""
    tok = AutoTokenizer.from_pretrained(folder)
    tok.pad_token = tok.eos_token = "<|im_end|>"
    config = DPOConfig(
        output_dir=f"{folder}/trl",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        precompute_ref_log_probs=True,
        **QUIETLY,
    )
    rows = []
    for prompt, chosen, rejected, _ in preferences:
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tok,
    )
    return trainer.train().metrics["train_samples_per_second"]


def policy_trainer(policy, tok, out, group, **settings):
    """GRPOTrainer around a model folder; without a data set it has one question that only its
    constructor sees, and its compute_loss is called with answers of ours."""
    rows = settings.pop("rows", [{"prompt": "a"}] * group)
    reward = settings.pop("reward", lambda completions, **_: [0.0] * len(completions))
    args = GRPOConfig(
        output_dir=str(out),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.pop("answers", group),
        num_generations=group,
        **settings,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tok,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def policy_trainer_speed(folder, questions, batch, group, steps):
    """GRPOTrainer's answer tokens a second with transformers' generation on the CPU, all steps but
    the first. questions: training.exam.Question of toybox, `batch` of them a step."""
    tok = AutoTokenizer.from_pretrained(folder)
    tok.eos_token = tok.pad_token = "<|im_end|>"
    ends, tokens = [], []

    def reward(prompts, completions, completion_ids, family, **_):
        tokens.append(sum(map(len, completion_ids)))
        answers = [completion[0]["content"] for completion in completions]
        return [float(toybox.check(*row)) for row in zip(family, prompts, answers)]

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    trainer = policy_trainer(
        folder,
        tok,
        f"{folder}/trl",
        group,
        rows=[{"prompt": q.messages, "family": q.family} for q in questions],
        reward=reward,
        answers=batch * group,
        max_steps=steps,
        max_completion_length=40,
        loss_type="grpo",
        optim="adamw_torch",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer.add_callback(Clock())
    trainer.train()
    return sum(tokens[1:]) / (ends[-1] - ends[0])
