"""finetune.py beside TRL, and its masks beside transformers' on real tokenizers."""

import random
from pathlib import Path

import numpy as np
import pytest
from test_finetune import WORDS, base, encoded, question_and_answer, run, tok, write  # noqa: F401

import chat
from common import Metrics
from finetune import Conversations, greedy_answers, open_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.peers

TEMPLATE = (  # ChatML that says who speaks, as TRL's assistant_only_loss needs it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def real(name, data_dir, folder):
    if name == "gpt2":
        return Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe")
    if name == "stories260K":
        return Tokenizer.load(data_dir / "stories260K" / "tokenizer.model")
    import mistral_common

    published = (
        Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    )
    (folder / "tokenizer.model").write_bytes(published.read_bytes())
    return Tokenizer.load(folder / "tokenizer.model")


@pytest.mark.parametrize("name", ["gpt2", "stories260K", "mistral-v3"])
def test_masks_on_real_tokenizers_that_got_chat_tokens_are_transformers_own(
    name, data_dir, tmp_path
):
    from transformers import AutoTokenizer

    ours = real(name, data_dir, tmp_path).with_special(chat.IM)
    ours.chat_template = TEMPLATE
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    path = data_dir / "instruct" / "instruction-data.json"
    records = [messages for _, messages, _ in chat.read_records(path)][:200]
    odd = ("é🙂 \n x", " Ünï 日本\n\nend")
    records.append([*records[0], *records[1], *question_and_answer(*odd)])
    for messages in records:
        want = theirs.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        # by its {% generation %}, and by knowing ChatML
        for template in (TEMPLATE, chat.CHATML_TEMPLATE):
            ours.chat_template = template
            ids, mask = chat.example(ours, messages)
            assert (ids, mask) == (want["input_ids"], want["assistant_masks"])
        assert theirs.decode([i for i, m in zip(ids, mask) if m]).endswith("<|im_end|>")


THEIR_SETTINGS = dict(
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=0.003,
    lr_scheduler_type="cosine",
    warmup_steps=0,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-10,
    weight_decay=0.05,
    max_grad_norm=0.0,
    assistant_only_loss=True,
    train_sampling_strategy="sequential",
    logging_steps=1,
    max_length=None,
)


def test_the_loss_curve_is_trls(base, tok, tmp_path):  # noqa: F811
    """20 steps of SFTTrainer on the same weights, conversations and order.

    One conversation fills more than half a row, so that neither packs."""
    from transformers import AutoTokenizer

    from peers.trl import make_trainer

    rng, talks = random.Random(5), []
    while len(talks) < 80:
        words = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(2)]
        talk = question_and_answer(*words)
        if 32 < len(chat.example(tok, talk)[0]) - 1 <= 64:
            talks.append(talk)
    data = write(tmp_path / "a.jsonl", talks)
    flags = "--steps 20 --optimizer adamw --schedule cosine --weight-decay 0.05 --seed 3 --spike 0"
    code, _, stderr = run(base, tmp_path / "ours", "--data", data, "--val", data, *flags.split())
    assert code == 0, stderr
    ours = [r["loss"] for r in Metrics.read(tmp_path / "ours" / "metrics.jsonl") if "loss" in r]
    split = Conversations([(1.0, encoded(tok, talks))])
    plan = split.plan(64, 3, 0)
    order = [int(np.searchsorted(split.begin, plan.row(r)[0][0])) for r in range(len(plan.order))]
    assert sorted(order) == list(range(80)) != order

    theirs = AutoTokenizer.from_pretrained(base)
    theirs.chat_template, theirs.pad_token = TEMPLATE, "<PAD>"
    rows = [{"messages": talks[i]} for i in order]
    trainer = make_trainer("SFT", base, theirs, rows, **THEIR_SETTINGS)
    trainer.train()
    curve = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(curve) == 20 and ours[0] - ours[-1] > 1
    difference = max(abs(a - b) for a, b in zip(ours, curve))
    print(f"largest difference of the losses: {difference:.2e}")
    assert difference < 1e-4


def test_what_was_tuned_chats_in_transformers(base, tmp_path):  # noqa: F811
    """The saved folder: its template, its end of turn as an end of generation, the same answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = {"red": "blue", "lion": "fox", "one": "two three"}
    talks = [question_and_answer(question, answer) for question, answer in known.items()]
    data, out = write(tmp_path / "a.jsonl", talks), tmp_path / "run"
    flags = "--steps 60 --batch 2 --lr 0.02".split()
    code, _, stderr = run(base, out, "--data", f"{data}:8", "--val", data, *flags)
    assert code == 0, stderr
    theirs = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ours, ours_model = open_model(out, "cpu")
    for question, answer in known.items():
        messages = [{"role": "user", "content": question}]
        prompt = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        new = new[0, prompt["input_ids"].size(1) :]
        assert theirs.decode(new, skip_special_tokens=True) == answer and len(new) < 20
        ids, _ = chat.render(ours, messages, True)
        assert greedy_answers(ours_model, ours, [ids], 20) == [(answer, True)]
