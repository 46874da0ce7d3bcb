"""TRL (pip install trl): its trainers on our models and records."""

import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental import cpo, orpo

import finetune
from training import toybox

# ChatML that marks what the assistant says
CHATML_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TRAINERS = {
    "SFT": (SFTTrainer, SFTConfig),
    "DPO": (DPOTrainer, DPOConfig),
    "CPO": (cpo.CPOTrainer, cpo.CPOConfig),
    "ORPO": (orpo.ORPOTrainer, orpo.ORPOConfig),
    "GRPO": (GRPOTrainer, GRPOConfig),
}
QUIETLY = dict(
    output_dir=f"{tempfile.gettempdir()}/trl",
    optim="adamw_torch",
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    logging_steps=10**6,
    disable_tqdm=True,
)
# For a trainer whose records only its constructor sees: compute_loss gets batches of ours.
UNSEEN = [{"prompt": "a", "chosen": "b", "rejected": "a b"}] * 4


def make_trainer(kind, model, tok, rows=UNSEEN, parts=None, **settings):
    """TRL's trainer of one kind around a model folder, on the CPU.

    parts: what its constructor takes besides; settings: its Config's."""
    trainer, config = TRAINERS[kind]
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config(**QUIETLY | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tok,
        **parts or {},
    )


def chat_tokenizer(folder):
    tok = AutoTokenizer.from_pretrained(folder)
    tok.pad_token = tok.eos_token = "<|im_end|>"
    return tok


def trainer_speed(kind, model, rows, **settings):
    """Records a second of training our model folder; start-up is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        ours, net = finetune.open_model(model, "cpu", torch.float32)  # with ChatML's tokens
        ours.save(folder)
        net.save_pretrained(folder)
        tok = chat_tokenizer(folder)
        if kind == "SFT":
            tok.chat_template = CHATML_GENERATION
        trainer = make_trainer(kind, folder, tok, rows, **settings)
        return trainer.train().metrics["train_samples_per_second"]


def policy_trainer_speed(folder, questions, batch, group, steps):
    """GRPOTrainer's answer tokens a second with transformers' generation on the CPU, all steps but
    the first. questions: training.exam.Question of toybox, `batch` of them a step."""
    rewarded, tokens = [], []

    def reward(prompts, completions, completion_ids, family, **_):
        rewarded.append(time.perf_counter())  # from here to the next time is a whole step
        tokens.append(sum(map(len, completion_ids)))
        answers = [completion[0]["content"] for completion in completions]
        return [float(toybox.check(*row)) for row in zip(family, prompts, answers)]

    make_trainer(
        "GRPO",
        folder,
        chat_tokenizer(folder),
        [{"prompt": q.messages, "family": q.family} for q in questions],
        {"reward_funcs": reward},
        per_device_train_batch_size=batch * group,
        num_generations=group,
        max_steps=steps,
        max_completion_length=40,
        loss_type="grpo",
    ).train()
    return sum(tokens[1:]) / (rewarded[-1] - rewarded[0])
