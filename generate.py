"""Text from a model folder or a GGUF file: one prompt, a conversation, or a file of prompts.

    python generate.py runs/shakespeare-char "ROMEO:" --temperature 0.8 --seed 1
    python generate.py runs/demo-dpo --chat                    # or with a question: its answer
    python generate.py runs/demo --batch prompts.jsonl --out answers.jsonl --quant int8
    torchrun --nproc-per-node 2 generate.py MODEL "prompt"     # a model larger than one card

A line of the batch file is {"prompt": text or ids} or {"messages": [...]}, with "id" and any field
of Sampling as it likes; "tools", "system" and "history" go with messages. From Python:

    engine = Engine("runs/demo")
    outputs = engine.generate(["Once upon", "Hello"], Sampling(max_tokens=50))

The Engine answers many requests at once over one paged key/value cache (Kwon et al. 2023), each
as if it were alone. `Engine.step` is the loop's body: Scheduler.schedule picks the tokens and gives
them pages, `compute` runs the model, `draw` draws the next tokens, `extend` makes text of them; a
stop string ends an answer in `shown_text`, and its pages are freed by Scheduler.remove at the end
of `extend`. Transformer.generate in model.py is the plain way, one token of one text at a time, and
tests/engine/test_scheduler.py holds the two equal.
"""

import copy
import hashlib
import itertools
import json
import secrets
import sys
import time
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import STUMBLES, UserError, cli, file_rows, parse_flags, read_json  # isort: skip

import torch

import chat
from engine.graphs import sent
from engine.native import quiet_torch
from engine.parallel import shard_model
from engine.runner import Runner, StepBatch, pool_size
from engine.sampler import Sampling, SamplingRow, draw_tokens, uniforms
from engine.scheduler import Delta, Output, Request, Scheduler, Sequence, TokenLogprob
from engine.warm_up import warm_up
from formats import peft
from formats.hub import SAMPLING_KEYS
from formats.vocab import find_tokenizer
from model import Transformer
from runtime import lost_rank_explained, resolve
from tokenizer import Tokenizer

READ_TOKENS = 256  # of a text that is only read, between two steps at most


# ------------------------------------------------------------------------------------------ loading
def load_engine_model(folder, device, dtype):
    """A model folder or .gguf file -> (Transformer, Tokenizer or None, Runtime).

    On the CPU a folder's weights stay in the file, in its type, until a Runner packs them. Of
    several ranks (torchrun) each gets its shard.
    """
    folder = Path(folder)
    runtime = resolve(device, dtype, compile="off")
    on_cpu = runtime.device.type == "cpu"
    alone = runtime.world == 1
    # Several ranks map a folder's files, and bring into memory only what they keep.
    where = runtime.device if alone else torch.device("cpu")
    weights = torch.float32 if on_cpu else runtime.dtype
    if folder.suffix == ".gguf" or folder.is_file():
        from formats import gguf

        model, tok = gguf.load(folder, where, weights, keep_packed=on_cpu and alone)
    else:
        model = Transformer.from_pretrained(folder, where, None if where.type == "cpu" else weights)
        tok = Tokenizer.load(folder) if find_tokenizer(folder) else None
    if tok and tok.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tok.vocab_size:,} ids, "
            f"the model only {model.config.vocab_size:,}"
        )
    if not alone:
        shard_model(model, runtime, weights)
    return model, tok, runtime


def read_adapter_tensors(folders, model, runtime):
    """{name: LoRA folder} -> {name: {layer's name: peft.AdapterTensors}}"""
    if folders and runtime.world > 1:
        raise UserError(
            f"LoRA adapters cannot be divided among {runtime.world} ranks; "
            "merge them first: python lora.py merge"
        )
    adapters = {}
    for name, folder in (folders or {}).items():
        _, adapters[name] = peft.read_layers(folder, model)
        if any(tensors.magnitude is not None for tensors in adapters[name].values()):
            raise UserError(
                f"{folder}: DoRA's magnitudes cannot share a batch with other adapters; "
                "merge it first: python lora.py merge"
            )
    return adapters


# ------------------------------------------------------------------------------------------- engine
@dataclass
class Launched:
    """A step that the device has been told to compute."""

    plan: dict  # {sequence: its tokens in this step, drafts included}
    # The sequences that get a token. One that has no blocks any more when the token is looked at
    # has ended, or was cancelled, after the launch.
    owners: list
    drawn: Any  # an iterator over what `extend` takes, which waits for the device
    tokens: Any  # the same ids where the device has them, for the next step


class Engine:
    """Many requests over one model: `submit`, `step` and `cancel`, or `generate` for whole answers.

    Under torchrun only rank 0 gets an engine; the others compute their parts of its steps in here
    and exit when it does.
    """

    def __init__(
        self,
        folder,
        device="auto",
        dtype="auto",
        quant=None,  # pack float weights: "int8" or "int4"
        kv_tokens=None,  # tokens whose keys and values are kept; None: what memory allows
        kv_dtype="auto",
        block_size=16,
        max_seqs=None,  # answers made at once; None: 64 on a CPU, 256 on a GPU
        step_tokens=None,  # computed in a step at most; None: 512 on a CPU, 8192 on a GPU
        prefix_cache=True,
        draft_tokens=0,  # speculate: so many tokens are guessed ahead, by `lookup_draft`
        adapters=None,  # {name: LoRA folder}
        loaded=None,  # what load_engine_model returns, in place of the folder
    ):
        model, self.tok, runtime = loaded or load_engine_model(folder, device, dtype)
        self.config = model.config
        # Ids that the model has rows for but the tokenizer does not know (padding) never come out.
        self.vocab_size = self.config.vocab_size
        if self.tok:  # it may also know more, in a training: ids that never come out, either
            self.vocab_size = min(self.vocab_size, self.tok.vocab_size)
        tensors = read_adapter_tensors(adapters, model, runtime)
        self.runner = Runner(model, runtime, quant, kv_dtype, block_size, tensors)
        del model  # its weights are packed, and the cache may take their room
        context = self.config.max_position_embeddings
        usual_seqs, usual_tokens = (256, 8192) if runtime.device.type == "cuda" else (64, 512)
        max_seqs = max_seqs or usual_seqs
        step_tokens = step_tokens or usual_tokens
        blocks = pool_size(self.runner, kv_tokens, max_seqs, context)
        self.runner.allocate(blocks, max_seqs)
        if runtime.rank:
            self.runner.follow()  # until rank 0 ends: it exits, and does not return
        self.max_model_len = min(context, blocks * block_size)  # so one request always fits alone
        self.scheduler = Scheduler(
            blocks, block_size, max_seqs, step_tokens, draft_tokens, prefix_cache
        )
        self.eos = frozenset(self.config.end_ids)
        given = self.config.generation
        self.sampling_defaults = {k: given[k] for k in SAMPLING_KEYS if given.get(k) is not None}
        Sampling(**self.sampling_defaults).check(self.vocab_size)
        self.requests = {}  # {id: the Sequences of its answers that are not finished}
        self.outbox = []  # deltas that the next step returns
        self.arrivals = itertools.count()
        self.launched = None  # the step that the device computes while the last one is looked at
        self.heard = 0.0  # when the last step ended, or work came where there was none
        self.longest_wait = 0.0  # seconds from there to the end of the next step

    @torch.inference_mode()
    def warm_up(self, tune=True):
        """On a GPU, before the first request: tune the kernels and record the CUDA graphs of all
        steps, so that none is held up by it. Without `tune` no kernel is tuned later, either: those
        that no earlier start has tuned take their first configuration that runs."""
        if tune:
            warm_up(self)  # the function of engine/warm_up.py
        self.runner.everywhere("close_tuning")

    @classmethod
    def of(cls, model, tok, dtype="auto", **options):
        """An engine over a model in memory, where it lies; the model stays usable.

        options: as of Engine. If the weights change, call `refresh`.
        """
        runtime = resolve(str(model.embed_tokens.weight.device), dtype, compile="off")
        runtime = replace(runtime, rank=0, world=1)  # of several ranks each may have its own
        return cls(None, loaded=(model, tok, runtime), **options)

    def refresh(self, model):
        """The weights of the model that the engine was made `of` have changed: between requests,
        pack them again where they lie, and forget the keys and values that the old ones made."""
        self.runner.forward.refresh(model)
        self.scheduler.pool.forget()

    # -- requests come in
    def encode(self, prompt):
        """str -> ids with the tokenizer's begin-of-text; ids are checked and passed on."""
        if isinstance(prompt, str):
            if self.tok is None:
                raise UserError("this model folder has no tokenizer, so prompts must be token ids")
            return self.tok.encode_prompt(prompt)
        for i in prompt:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i!r} is not one of this model's {self.vocab_size:,}")
        return prompt

    def submit(self, prompt, sampling, request_id=None, adapter=None):
        """Queue one request -> its id. UserError, with the numbers, for what cannot be done.

        prompt: str or ids; adapter: name of one of the engine's LoRA adapters. Its n answers are
        sequences of their own: they share the blocks of the prompt, as all equal prompts do.
        """
        sampling.check(self.vocab_size)
        ids = self.encode(prompt)
        if not ids:
            raise UserError("the prompt has no tokens; give at least one character")
        if len(ids) >= self.max_model_len:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and with its answer must fit into the "
                f"{self.max_model_len:,} that model and cache (--kv-tokens) hold"
            )
        if sampling.stop and self.tok is None:
            raise UserError("stop strings need a tokenizer; this model folder has none")
        if request_id is None:
            request_id = next(self.arrivals)
        if request_id in self.requests:
            raise UserError(f"request id {request_id!r} is in use")
        ends = frozenset(sampling.stop_ids)
        if not sampling.ignore_eos:
            ends |= self.eos
        adapter = self.runner.adapter_index(adapter)
        if not self.has_work:
            self.heard = time.monotonic()
        request = Request(request_id, ids, sampling, adapter, ends)
        full = min(len(ids) + sampling.max_tokens, self.max_model_len)
        seed = secrets.randbits(48) if sampling.seed is None else sampling.seed
        self.requests[request_id] = []
        for index in range(sampling.n):
            own_seed = seed if sampling.n == 1 else child_seed(seed, index)
            stream = self.tok.stream(skip_special=True) if self.tok else None
            constraint = copy.copy(sampling.constraint)
            arrival = next(self.arrivals)
            seq = Sequence(request, index, arrival, own_seed, list(ids), full, stream, constraint)
            self.requests[request_id].append(seq)
            self.scheduler.add(seq)
        self.scheduler.counts["prompt_tokens"] += len(ids)
        return request_id

    def cancel(self, request_id):
        """Stop a request in whatever state it is and free all it holds.

        Its unfinished answers end with "abort" in the next step.
        """
        for seq in self.requests.pop(request_id, ()):
            self.scheduler.remove(seq)
            self.outbox.append(Delta(request_id, seq.index, finish_reason="abort"))

    @property
    def has_work(self):
        return bool(self.outbox or self.scheduler.waiting or self.scheduler.running)

    # -- one step
    @torch.inference_mode()
    def step(self):
        """Compute one batch -> list of Delta. Waits for nothing but the computation.

        On a GPU the step that follows a step of decodes is launched before the tokens of that one
        are looked at: a sequence that has ended by then computed a token too many.
        """
        deltas = self.outbox
        self.outbox = []
        with quiet_torch(self.runner.native):
            launched = self.launched or self.launch()
            if launched:
                self.count_computed(launched.plan)
                self.launched = self.launch_next(launched)
                deltas += self.accept(launched)
        if not self.scheduler.running:
            self.launched = None  # its sequences have all ended
        now = time.monotonic()
        self.longest_wait = max(self.longest_wait, now - self.heard)
        self.heard = now
        return deltas

    def launch(self):
        """Schedule a step and start to compute it -> Launched, or None where nothing is to do."""
        plan = self.scheduler.schedule()
        for seq, n in plan.items():
            if n > seq.remaining:  # a decode, with room for a draft
                seq.draft = lookup_draft(seq.ids, n - 1)
        return self.compute(plan) if plan else None

    def launch_next(self, launched):
        """The step after one whose tokens only the device knows -> Launched, or None.

        It is sure to be this: a token for each of the same sequences, but for those that reach
        their length now. So nobody may wait to run, and nobody may have to wait for a block.
        """
        scheduler = self.scheduler
        if launched.tokens is None or scheduler.waiting or scheduler.max_draft:
            return None
        alive = [seq for seq in launched.owners if seq.blocks]
        if len(alive) < len(scheduler.running):
            return None
        plan, rows = {}, []
        for row, seq in enumerate(launched.owners):
            if not seq.blocks or len(seq.ids) + 1 == seq.full:
                continue
            if not scheduler.reserve(seq, len(seq.ids) + 1):
                return None
            plan[seq] = 1
            rows.append(row)
        if not plan:
            return None
        return self.compute(plan, launched.tokens[sent(torch.tensor(rows), self.runner.device)])

    def compute(self, plan, ids=None):
        """Run the plan's tokens and draw those that come next -> Launched.

        ids: the tokens, one of each sequence, where only the device knows them. Of a sequence whose
        tokens are then all computed the last one has a row of logits, as has each id of its draft.
        """
        batch = StepBatch()
        owners = []
        for seq, n in plan.items():
            # [0] stands for the id that only the device knows.
            new = seq.ids[seq.computed : seq.computed + n] or [0]
            rows = ()
            if seq.computed + len(new) >= len(seq.ids):
                rows = range(len(new) - 1, len(new) + len(seq.draft))
                owners.append(seq)
            batch.add(seq.blocks, new + seq.draft, seq.computed, rows, seq.request.adapter)
        logits = self.runner(batch, ids)
        return Launched(plan, owners, *self.draw(logits, owners, ids is not None))

    def sampling_row(self, seq, further):
        """The sampler's view of one answer, so many ids of its draft further on.

        What edits logits needs all ids so far: no step is launched ahead of one with such an answer
        (Runner.draw leaves its tokens None).
        """
        request = seq.request
        if not request.sampling.edits_logits:
            return request  # which has `sampling`, too: nothing else of a row is read
        output = seq.ids[len(request.prompt) :] + seq.draft[:further]
        return SamplingRow(request.sampling, output, request.prompt, request.ends, seq.constraint)

    def count_computed(self, plan):
        """The keys and values of a launched step's tokens count as there: who reads them comes
        after it."""
        for seq, n in plan.items():
            if not seq.blocks:
                continue  # it ended, or was cancelled, after this step had been launched
            # The ids of a draft are not in seq.ids yet: `extend` counts those that are accepted.
            seq.computed = min(seq.computed + n, len(seq.ids))
            if seq.computed >= (seq.published + 1) * self.scheduler.block_size:
                self.scheduler.publish(seq)

    def accept(self, launched):
        """Take the tokens that were drawn, and keep a draft as far as it is what was drawn
        -> deltas.

        A draft is right exactly where it equals the token that the model itself drew with that
        position's random number, so speculation changes how many steps are taken and nothing else
        (test_speculation_changes_no_answer).
        """
        deltas = []
        for seq in launched.owners:
            drawn = list(itertools.islice(launched.drawn, len(seq.draft) + 1))
            if not seq.blocks:
                continue
            delta = self.extend(seq, drawn)
            seq.draft = []
            self.scheduler.counts["generated_tokens"] += len(delta.token_ids)
            deltas.append(delta)
        return deltas

    def draw(self, logits, owners, ahead):
        """Draw the next tokens of sequences, each with the random number of its position.

        ahead: whether a token of each sequence is not known here yet
        -> an iterator over (token, whether nothing was allowed, TokenLogprob or None) for each row
        of logits; the tokens on the device, or None where the next step cannot begin with them.
        """
        if not owners:
            return (), None
        rows, seeds, positions = [], [], []
        for seq in owners:
            for i in range(len(seq.draft) + 1):
                rows.append(self.sampling_row(seq, i))
                seeds.append(seq.seed)
                positions.append(len(seq.ids) + ahead + i)
        logits = logits[:, : self.vocab_size]
        u = uniforms(seeds, positions)
        if any(row.sampling.logprobs is not None for row in rows):
            return draw_with_logprobs(logits, rows, u), None
        return self.runner.draw(logits, rows, u)

    # -- tokens become text
    def extend(self, seq, drawn):
        """Append drawn tokens up to the first that is not the draft's, or ends the answer -> Delta.

        drawn: (id, nothing was allowed, logprob) for each. An answer that ends frees its blocks.
        """
        request = seq.request
        known = len(seq.ids)
        text, logprobs = "", []
        end = None  # Delta.end
        for guess, (token, nothing_allowed, logprob) in zip([*seq.draft, None], drawn):
            if nothing_allowed:
                seq.finish_reason = "error"
                seq.error = (
                    "no token is allowed: constraint and min_tokens contradict each other, or the "
                    "model computes inf or NaN"
                )
                if seq.constraint and seq.constraint.error:
                    seq.error = seq.constraint.error
            elif token in request.ends:
                seq.finish_reason = "stop"
                end = logprob and (token, logprob.logprob)
            else:
                seq.ids.append(token)
                if logprob:
                    logprobs.append(logprob)
                text += self.advance(seq, token)
            if seq.finish_reason or token != guess:
                break
        ids = seq.ids[known:]
        if ids:
            # The keys of the accepted part of a draft are there; the last id was not computed.
            seq.computed += len(ids) - 1
        if seq.finish_reason:
            if seq.stream:
                text += shown_text(seq, seq.stream.flush())
            text += seq.held
            self.scheduler.remove(seq)
            self.requests[request.id].remove(seq)
            if not self.requests[request.id]:
                del self.requests[request.id]
        return Delta(request.id, seq.index, text, ids, logprobs, seq.finish_reason, seq.error, end)

    def advance(self, seq, token):
        """Take a token that was appended: its text, and whether the answer ends with it -> text."""
        text = shown_text(seq, seq.stream.push(token)) if seq.stream else ""
        if seq.constraint is not None:
            seq.constraint.advance(token)
            if seq.constraint.done:
                seq.finish_reason = "stop"
        if len(seq.ids) == seq.full and seq.finish_reason is None:
            seq.finish_reason = "length"
        return text

    # -- whole answers
    def generate(self, prompts, sampling=None):
        """-> list of Output in the prompts' order, the n answers of a prompt next to each other.

        prompts: one or a list of str or id lists; sampling: one for all or a list. Without one it
        is Sampling(): what generation_config.json says is for the command and the server, which
        take it from `sampling_defaults`.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not isinstance(sampling, (list, tuple)):
            sampling = [sampling or Sampling()] * len(prompts)
        outputs = {}
        try:
            for prompt, each in zip(prompts, sampling, strict=True):
                i = self.submit(prompt, each)
                for index in range(each.n):
                    outputs[i, index] = Output(i, index)
            requests = {i for i, _ in outputs}
            while not requests.isdisjoint(self.requests):
                for delta in self.step():
                    if delta.request_id in requests:
                        outputs[delta.request_id, delta.index].add(delta)
        except BaseException:  # an interrupt leaves the engine as it was
            for i, _ in outputs:
                self.cancel(i)
            raise
        return list(outputs.values())

    @torch.inference_mode()
    def read(self, ids, count=None):
        """Read a text by itself. Yields lists, one a chunk, so that steps can come in between.

        Together they are a TokenLogprob for each token, with `count` of the likeliest: what the
        model thought of the text; or without a count the mean over the text of the hidden states
        after the last norm, at length 1: C floats. Its keys lie in a cache of its own, of which the
        runner has one: a text is read to its end, or given up, before the next one begins.
        """
        self.scheduler.counts["prompt_tokens"] += len(ids)
        size = min(READ_TOKENS, max(self.scheduler.step_tokens // 4, 1))
        embed = count is None
        total = len(ids)
        states = torch.zeros(())  # the sum of hidden states, (C,)
        if not embed:
            total -= 1  # nothing comes after the last token
            yield [TokenLogprob(ids[0], None, [])]  # and nothing before the first
        for past in range(0, total, size):
            end = min(past + size, total)
            found = self.runner.everywhere("read", ids[past:end], past, total, embed)
            if embed:
                states = states + found.sum(0)  # (T, C) -> (C,) float32
                yield []
            else:
                next_ids = torch.tensor(ids[past + 1 : end + 1], device=found.device)
                logits = found[:, : self.vocab_size]
                yield top_logprobs(logits, next_ids, min(count, self.vocab_size))
        if embed:
            yield (states / states.norm()).tolist()

    def stats(self):
        """Counters since the start and the state now, for /metrics."""
        s = self.scheduler
        return {
            "running": len(s.running),
            "waiting": len(s.waiting),
            "blocks_total": len(s.pool.refs),
            "blocks_used": len(s.pool.refs) - len(s.pool.free),
            "longest_wait": self.longest_wait,
            **s.counts,
        }


def child_seed(seed, index):
    """The seed of one of n answers: a number of its own, the same in every run."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, index), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def draw_with_logprobs(logits, rows, u):
    """-> for each row (token, whether nothing was allowed, TokenLogprob or None)."""
    asked = [r for r, row in enumerate(rows) if row.sampling.logprobs is not None]
    unedited = logits[asked]  # a copy: the draw overwrites logits
    tokens, failed = draw_tokens(logits, rows, u)
    found: list = [None] * len(rows)
    most = max(rows[r].sampling.logprobs for r in asked)
    for r, logprob in zip(asked, top_logprobs(unedited, tokens[asked], most)):
        del logprob.top[rows[r].sampling.logprobs :]
        found[r] = logprob
    return zip(tokens.tolist(), failed.tolist(), found)


def top_logprobs(logits, tokens, count):
    """-> a TokenLogprob for each of tokens (R,), with the `count` likeliest beside it.

    logits (R, V): those of the model itself, before any penalty or temperature
    """
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)  # (R, count)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]  # (R, V) -> (R, 1) -> (R,)
    rows = zip(*(tensor.tolist() for tensor in (tokens, chosen, ids, values)))
    return [TokenLogprob(i, logprob, list(zip(top, by))) for i, logprob, top, by in rows]


def lookup_draft(ids, most):
    """Prompt lookup (Saxena 2023): what followed the last 3, or 2, tokens earlier on."""
    data = array("i", ids[:-1]).tobytes()
    for n in (3, 2):
        tail = array("i", ids[-n:]).tobytes()
        at = data.rfind(tail)
        while at >= 0 and at % 4:  # not on a token's border: look further to the front
            at = data.rfind(tail, 0, at + len(tail) - 1)
        if at >= 0:
            after = at // 4 + n
            return ids[after : after + most]
    return []


def shown_text(seq, text):
    """New text of an answer -> what can be shown; a stop string ends the answer before itself.

    The end of the text is held back while a stop string may begin in it.
    """
    stops = seq.request.sampling.stop
    if not stops:
        return text
    text = seq.held + text
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        seq.finish_reason = "stop"
        seq.stream = None  # nothing after it is shown
        seq.held = ""
        return text[: min(found)]
    shown = len(text)
    beginnings = seq.request.sampling.stop_beginnings
    if text.endswith(beginnings):
        shown -= max(len(b) for b in beginnings if text.endswith(b))
    seq.held = text[shown:]
    return text[:shown]


# ---------------------------------------------------------------------------------------- command
@dataclass
class Args:
    model: str = ""  # the model folder, or a .gguf file
    prompt: str = "\n"  # the text to continue
    chat: bool = False  # talk: each line you type is a turn
    batch: str = ""  # answer every record of this file; a run cut short goes on where it was
    ignore_keys: str = ""  # KEY,KEY: keys of its records and messages to leave out
    out: str = ""  # where the batch's answers go, a JSON line each
    max_tokens: int = 500  # how many tokens to make at most
    temperature: float = 0.8  # 0 is greedy: always the likeliest token
    top_k: int = 0  # sample among the k likeliest only; 0 is all
    top_p: float = 1.0  # sample among the likeliest that together have this probability
    min_p: float = 0.0  # sample among those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
    stop: str = ""  # end before this text
    seed: int = 0  # same seed, same text: equal lines of a batch get equal answers
    regex: str = ""  # the answer must match this regular expression
    json_schema: str = ""  # the answer must be JSON of this file's schema; "any" is any JSON
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of the weights
    quant: str = ""  # int8 or int4: pack the weights so when they are loaded
    kv_dtype: str = "auto"  # of keys and values: auto, float32, bfloat16, float16, int8
    kv_tokens: int = 0  # how many tokens' keys and values to keep; 0 is what memory allows
    max_seqs: int = 0  # texts made at once; 0 is 64 on a CPU, 256 on a GPU
    draft_tokens: int = 0  # guess so many tokens ahead, as they followed earlier in the text
    adapter: str = ""  # a LoRA adapter's folder


ENGINE_FLAGS = "device dtype quant kv_dtype kv_tokens max_seqs draft_tokens"
SAMPLING_FLAGS = "max_tokens temperature top_k top_p min_p repetition_penalty seed"


def named(args, names):
    """The flags of these names -> {name: value}."""
    return {name: getattr(args, name) for name in names.split()}


def read_constraint(args, tok):
    """--regex or --json-schema -> what the answers must match, or None."""
    if not args.regex and not args.json_schema:
        return None
    if args.regex and args.json_schema:
        raise UserError("--regex and --json-schema: an answer can match only one, give one")
    from engine.grammar import Constraint, Vocabulary, json_grammar, regex_grammar

    if args.regex:
        grammar = regex_grammar(args.regex)
    else:
        grammar = json_grammar(None if args.json_schema == "any" else read_json(args.json_schema))
    return Constraint(grammar, Vocabulary(tok))


def print_answer(engine, prompt, sampling, adapter):
    """Print an answer as it is made -> its text; ends with a line of speed on stderr."""
    begin = time.monotonic()
    first = None  # when the first token came
    answer = Output(None, 0)
    engine.submit(prompt, sampling, adapter=adapter)
    while engine.has_work:
        for delta in engine.step():
            first = first or time.monotonic()
            print(delta.text, end="", flush=True)
            answer.add(delta)
    print()
    count = len(answer.token_ids)
    speed = (count - 1) / (time.monotonic() - first) if count > 1 else 0
    print(
        f"[{count} tokens ({answer.error or answer.finish_reason}), "
        f"{speed:.0f} tok/s after {first - begin:.2f} s]",
        file=sys.stderr,
    )
    return answer.text


def turn_ends(tok):
    """The ids that end a turn of a conversation, for Sampling.stop_ids; none where only the
    model's own end of text is known."""
    end = chat.stop_id(tok)
    return () if end is None else (end,)


def talk(engine, sampling, adapter, question):
    """A conversation on the terminal, or one question. The cache keeps what was said so far."""
    messages = []
    sampling = replace(sampling, stop_ids=turn_ends(engine.tok))
    while True:
        try:
            line = question or input("> ")
        except EOFError:
            return
        messages.append({"role": "user", "content": line})
        ids, _ = chat.render(engine.tok, messages, add_generation_prompt=True)
        answer = print_answer(engine, ids, sampling, adapter)
        messages.append({"role": "assistant", "content": answer})
        if question:
            return


# -- a file of prompts
def read_request(record, sampling, tok):
    """A record of a batch file -> (prompt, Sampling); its own fields go before the flags."""
    fields = chat.known_keys("the record", record, record)
    if ("prompt" in fields) == any(key in fields for key in chat.TALKS):
        raise UserError('the record must have either "prompt" or "messages"')
    prompt = fields.pop("prompt", None)
    if prompt is None:
        messages, tools = chat.take_messages(fields)
        prompt, _ = chat.render(tok, messages, True, tools)
        stop_ids = fields.get("stop_ids", [])
        if isinstance(stop_ids, list) and not fields.get("ignore_eos"):
            fields["stop_ids"] = [*stop_ids, *turn_ends(tok)]
    if not isinstance(prompt, (str, list)):
        raise UserError(f"prompt is {prompt!r}, not a text or a list of ids")
    known = [name for name in Sampling.__annotations__ if name != "constraint"]
    fields = chat.known_keys("the record", fields, (*known, *chat.SAYS_NOTHING))
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("logit_bias"), dict):  # whose keys are strings in JSON
        bias = fields["logit_bias"].items()
        fields["logit_bias"] = {int(i) if i.isdecimal() else i: value for i, value in bias}
    return prompt, replace(sampling, **{key: fields[key] for key in known if key in fields})


def answered_lines(path):
    """The numbers of lines that an earlier run answered; half a last line is cut off.

    A line that had an error is asked again: its later row counts.
    """
    done = set()
    whole = 0  # bytes of whole lines
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            # Half a line begins as `write` below begins a row, or the file is somebody else's.
            if b'{"line": '.startswith(line[:9]) and not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if "error" not in row:
                    done.add(row["line"])
            except STUMBLES:
                raise UserError(
                    f"{path}: not answers of a batch; give --out another name"
                ) from None
            whole += len(line)
        file.truncate(whole)
    return done


def answer_row(answer):
    """An Output as a line of the batch's answers has it."""
    row = {
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }
    if answer.logprobs:
        row["logprobs"] = [vars(token) for token in answer.logprobs]
    if answer.error:
        row["error"] = answer.error
    return row


def run_batch(engine, args, sampling):
    """Answer the lines of args.batch into args.out as they are finished, or say what is wrong."""
    from tqdm import tqdm

    if not args.out:
        raise UserError("--batch needs --out: the file for the answers")
    begin = time.monotonic()
    done = answered_lines(args.out)
    waiting = [row for row in file_rows(args.batch) if row.number not in done]
    waiting.reverse()
    total = len(waiting)
    errors = 0
    ignored = set(filter(None, args.ignore_keys.split(",")))
    asked = {}  # {number of a line that the engine has: (its id, its Outputs)}
    with (
        open(args.out, "a", encoding="utf-8") as out,
        tqdm(total=total, unit="answer", disable=None) as bar,
    ):

        def write(number, **row):
            out.write(json.dumps({"line": number, **row}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update()

        while waiting or engine.has_work:
            while waiting and len(asked) < 2 * engine.scheduler.max_seqs:  # keeps the engine busy
                number, _, record, fault = waiting.pop()
                record = chat.without(record, ignored)
                name = number
                if isinstance(record, dict) and record.get("id") is not None:
                    name = record["id"]
                try:
                    if fault:
                        raise UserError(fault)
                    prompt, its_sampling = read_request(record, sampling, engine.tok)
                    engine.submit(prompt, its_sampling, number, args.adapter)
                except UserError as error:
                    write(number, id=name, error=str(error))
                    errors += 1
                    continue
                asked[number] = name, [Output(number, i) for i in range(its_sampling.n)]
            for delta in engine.step():
                number = delta.request_id
                name, answers = asked[number]
                answers[delta.index].add(delta)
                if all(answer.finish_reason for answer in answers):
                    write(number, id=name, answers=[answer_row(answer) for answer in answers])
                    del asked[number]
    tokens = engine.stats()["generated_tokens"]
    seconds = time.monotonic() - begin
    print(
        f"wrote    {args.out}: {total:,} lines, {errors:,} with errors, "
        f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tok/s"
    )


@lost_rank_explained("Start it again.")
def main():
    typed = parse_flags(Args, __doc__, positional=("model", "prompt"))
    args = Args(**typed)
    unread = {"prompt", "chat"} if args.batch else {"out", "ignore_keys"}
    if unread & typed.keys():
        raise UserError("--out and --ignore-keys go with --batch, a prompt and --chat without it")
    adapters = {args.adapter: args.adapter} if args.adapter else {}
    engine = Engine(args.model, adapters=adapters, **named(args, ENGINE_FLAGS))
    defaults = {k: v for k, v in engine.sampling_defaults.items() if k not in typed}
    if defaults:
        print(f"sampling {defaults}, as generation_config.json says", file=sys.stderr)
    sampling = Sampling(
        **named(args, SAMPLING_FLAGS) | defaults,
        stop=(args.stop,) if args.stop else (),
        constraint=read_constraint(args, engine.tok),
    )
    if args.batch:
        run_batch(engine, args, sampling)
    elif args.chat:
        talk(engine, sampling, args.adapter, args.prompt.strip())
    else:
        print(args.prompt, end="", flush=True)
        print_answer(engine, args.prompt, sampling, args.adapter)


if __name__ == "__main__":
    cli(main)
