"""Text from a model folder or a GGUF file: one prompt, a conversation, or a file of prompts.

    python generate.py runs/shakespeare-char "ROMEO:" --temperature 0.8 --seed 1
    python generate.py runs/demo-dpo --chat                              # or with a question: its answer
    python generate.py runs/demo --batch prompts.jsonl --out answers.jsonl --max-tokens 100 --quant int8
    torchrun --nproc-per-node 2 generate.py MODEL "prompt"               # a model larger than one card, over two

A line of the batch file is {"prompt": text or ids} or {"messages": [...]}, with "id" and any field of Sampling as it likes.
`generate` below is the plain way to do it, one token of one text at a time; the engine (engine.py) gives the same, faster.
"""

import bisect
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import secrets
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import chat
from common import UserError, cli, parse_flags, read_json
from engine.native import quiet_torch
from engine.parallel import divide
from engine.runner import Batch, Runner, pool_size
from engine.sampler import Row, Sampling, draw, top_logprobs, uniform
from engine.scheduler import Delta, Output, Request, Scheduler, Sequence, TokenLogprob, find_draft
from model import Transformer
from runtime import lost_rank_explained, resolve
from tokenizer import Tokenizer


@dataclass
class Args:
    model: str = ""  # the model folder, or a .gguf file
    prompt: str = "\n"  # the text to continue
    chat: bool = False  # talk: each line you type is a turn
    batch: str = ""  # answer every line of this JSONL file; a run that was cut short goes on where it stopped
    out: str = ""  # where the batch's answers go, a JSON line each
    max_tokens: int = 500  # how many tokens to make at most
    temperature: float = 0.8  # 0 is greedy: always the likeliest token
    top_k: int = 0  # sample among the k likeliest only; 0 is all
    top_p: float = 1.0  # sample among the likeliest that together have this probability
    min_p: float = 0.0  # sample among those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
    stop: str = ""  # end before this text
    seed: int = 0  # same seed, same text
    regex: str = ""  # the answer must match this regular expression
    json_schema: str = ""  # the answer must be JSON of the schema in this file; "any" is any JSON
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of the weights
    quant: str = ""  # int8 or int4: pack the weights so when they are loaded
    kv_dtype: str = (
        "auto"  # of the keys and values kept: auto, float32, bfloat16, float16, int8, fp8
    )
    kv_tokens: int = 0  # how many tokens' keys and values to keep; 0 is what memory allows
    max_seqs: int = 0  # texts made at once; 0 is 64 on a CPU, 256 on a GPU
    draft: str = ""  # speculate: "lookup", or the folder of a smaller model of the same vocabulary
    draft_tokens: int = 4  # tokens guessed ahead
    adapter: str = ""  # a LoRA adapter's folder
    debug_invariants: bool = False  # check the engine's books after every step


# ------------------------------------------------------------------------------ one token at a time


# --------------------------------------------------------------------------- prompt, chat and batch
def start_engine(args):
    return Engine(
        args.model,
        args.device,
        args.dtype,
        args.quant or None,
        args.kv_tokens or None,
        kv_dtype=args.kv_dtype,
        max_seqs=args.max_seqs or None,
        draft=args.draft or None,
        draft_tokens=args.draft_tokens,
        adapters={"cli": args.adapter} if args.adapter else None,
        debug_invariants=args.debug_invariants,
    )


def sampling_of(args, engine):
    """The flags as a Sampling."""
    constraint = None
    if args.regex or args.json_schema:
        from engine.grammar import Constraint, Vocabulary, json_grammar, regex_grammar

        schema = None if args.json_schema in ("", "any") else read_json(args.json_schema)
        constraint = Constraint(
            regex_grammar(args.regex) if args.regex else json_grammar(schema),
            Vocabulary(engine.tok),
        )
    same = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling) if hasattr(args, f.name)
    }
    return Sampling(**same | {"stop": (args.stop,) if args.stop else (), "constraint": constraint})


def stream(engine, prompt, sampling, adapter=None):
    """Print an answer as it is made -> its text; ends with a line of speed on stderr."""
    begin, text, count, first = time.time(), "", 0, None
    engine.submit(prompt, sampling, adapter=adapter)
    while engine.has_work:
        for delta in engine.step():
            first = first or time.time()
            print(delta.text, end="", flush=True)
            text, count = text + delta.text, count + len(delta.token_ids)
            if delta.error:
                print(f"\n[{delta.error}]", file=sys.stderr)
    print()
    first = first or begin
    speed = (count - 1) / (time.time() - first) if count > 1 else 0
    print(f"[{count} tokens, {speed:.0f} tok/s after {first - begin:.2f} s]", file=sys.stderr)
    return text


def talk(engine, sampling, adapter=None, question=""):
    """A conversation on the terminal, or one question. The cache keeps what was said, so a turn costs only what is new."""
    messages, end = [], chat.stop_id(engine.tok)
    sampling.stop_ids = (end,) if end is not None else ()
    while True:
        try:
            line = question or input("> ")
        except EOFError:
            return
        messages.append({"role": "user", "content": line})
        ids, _ = chat.render(engine.tok, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": stream(engine, ids, sampling, adapter)})
        if question:
            return


def read_request(line, number, sampling, tok):
    """A line of a batch file -> (id, prompt, Sampling). Fields of Sampling in it go before the flags."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError(f'line {number}: expected an object with either "prompt" or "messages"')
    own = {k: v for k, v in row.items() if k not in ("id", "prompt", "messages")}
    unknown = own.keys() - {f.name for f in dataclasses.fields(Sampling)} | own.keys() & {
        "constraint"
    }
    if unknown:
        raise UserError(f"line {number}: unknown field {', '.join(sorted(unknown))}")
    prompt = row.get("prompt")
    if "messages" in row:
        prompt, _ = chat.render(tok, row["messages"], add_generation_prompt=True)
        end = chat.stop_id(tok)
        own.setdefault("stop_ids", (end,) if end is not None else ())
    return row.get("id", number), prompt, dataclasses.replace(sampling, **own)


def answered(path):
    """The line numbers that an earlier run answered; what a crash left of a last line is cut off."""
    path, done, good = Path(path), set(), 0
    if not path.exists():
        return done
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["line"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: not answers of a batch; give --out another name"
                ) from None
            good += len(line)
        file.truncate(good)
    return done


def run_batch(engine, args, sampling, adapter=None):
    """Answer the lines of args.batch into args.out as they are finished; a line at fault gets its reason as "error"."""
    from tqdm import tqdm

    if not args.out:
        raise UserError("--batch needs --out: the file for the answers")
    lines, done, rows = (
        Path(args.batch).read_text(encoding="utf-8").splitlines(),
        answered(args.out),
        {},
    )
    waiting = [n for n, line in enumerate(lines, 1) if line.strip() and n not in done][::-1]
    total, begin = len(waiting) + len(done), time.time()
    with (
        open(args.out, "a", encoding="utf-8") as out,
        tqdm(total=total, initial=len(done), unit="answer", disable=None) as bar,
    ):

        def finish(number, **row):
            row = {
                "line": number,
                **row,
                "seconds": round(time.time() - begin, 3),
            }  # since this run of the command began
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.update()

        while waiting or engine.has_work:
            while (
                waiting and len(rows) < 2 * engine.scheduler.max_seqs
            ):  # enough to keep the engine busy
                number = waiting.pop()
                try:
                    name, prompt, own = read_request(
                        lines[number - 1], number, sampling, engine.tok
                    )
                    engine.submit(prompt, own, request_id=number, adapter=adapter)
                    rows[number] = name, [Output(number, k, "", [], []) for k in range(own.n)]
                except UserError as error:
                    finish(number, error=str(error))
            for delta in engine.step():
                name, answers = rows[delta.request_id]
                answers[delta.index].add(delta)
                if all(a.finish_reason for a in answers):
                    del rows[delta.request_id]
                    finish(
                        delta.request_id,
                        id=name,
                        answers=[
                            {
                                "text": a.text,
                                "tokens": len(a.token_ids),
                                "finish_reason": a.finish_reason,
                                **({"error": a.error} if a.error else {}),
                            }
                            for a in answers
                        ],
                    )
            stats = engine.stats()
            bar.set_postfix(
                running=stats["running"], tokens=stats["generated_tokens"], refresh=False
            )
    count, seconds = engine.stats()["generated_tokens"], time.time() - begin
    print(
        f"wrote    {args.out}: {total - len(done):,} answers, {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tok/s"
    )


@lost_rank_explained("Start it again.")
def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model", "prompt")))
    engine = start_engine(args)
    sampling, adapter = sampling_of(args, engine), "cli" if args.adapter else None
    if args.batch:
        run_batch(engine, args, sampling, adapter)
    elif args.chat:
        talk(engine, sampling, adapter, args.prompt.strip())
    else:
        print(args.prompt, end="", flush=True)
        stream(engine, args.prompt, sampling, adapter)


def load_model(folder, device="auto", dtype="auto", split=True):
    """A model folder or .gguf file -> (Transformer, Tokenizer or None, Runtime).

    On the CPU a folder's weights stay in the file, in its type, until a Runner packs them. Of several ranks (torchrun) each gets
    its part of the model, unless `split` is False: then this rank has it alone, and so says its Runtime."""
    runtime, folder = resolve(device, dtype, "off"), Path(folder)
    runtime = runtime if split else replace(runtime, rank=0, world=1)
    # several ranks map a folder's files, and bring into memory only what they keep
    on_cpu, place = (
        runtime.device.type == "cpu",
        runtime.device if runtime.world == 1 else torch.device("cpu"),
    )
    weights = torch.float32 if on_cpu else runtime.dtype
    if folder.suffix == ".gguf":
        from formats import gguf

        model, tok = gguf.load(folder, place, weights, keep_packed=on_cpu and runtime.world == 1)
    else:
        model = Transformer.from_pretrained(folder, place, None if place.type == "cpu" else weights)
        found = any(
            (folder / name).is_file()
            for name in ("tokenizer.json", "tokenizer.model", "vocab.bpe", "tekken.json")
        )
        tok = Tokenizer.load(folder) if found else None
    if tok and tok.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tok.vocab_size:,} ids, the model only {model.config.vocab_size:,}"
        )
    if runtime.world > 1:
        divide(model, runtime, weights)
    return model, tok, runtime


class Engine:
    """Many requests over one model. See `submit`, `step`, `cancel`, or `generate` for whole answers at once.

    kv_tokens: how many tokens' keys and values to keep; None takes what memory allows. max_seqs: answers made at once;
    step_tokens: tokens computed in a step at most; draft: "lookup" or a folder with a smaller model of the
    same vocabulary; adapters: {name: LoRA folder}; debug_invariants: check the books after every step.

    Under torchrun only rank 0 gets an engine: the others compute their parts of its steps in here and exit when it does.
    """

    def __init__(
        self,
        folder,
        device="auto",
        dtype="auto",
        quant=None,
        kv_tokens=None,
        *,
        kv_dtype="auto",
        block_size=16,
        max_seqs=None,
        step_tokens=None,
        max_model_len=None,
        prefix_cache=True,
        draft=None,
        draft_tokens=4,
        adapters=None,
        debug_invariants=False,
    ):
        model, tok, runtime = load_model(folder, device, dtype)
        self.start(
            model,
            tok,
            runtime,
            quant,
            kv_tokens,
            kv_dtype,
            block_size,
            max_seqs,
            step_tokens,
            max_model_len,
            prefix_cache,
            draft,
            draft_tokens,
            adapters,
            debug_invariants,
        )

    @classmethod
    def of(
        cls, model, tok, *, dtype="auto", quant=None, kv_tokens=None, kv_dtype="auto", max_seqs=None
    ):
        """An engine over a model that is in memory already, on the device where it lies; the model stays as it is."""
        engine = cls.__new__(cls)
        runtime = resolve(str(model.embed_tokens.weight.device), dtype, "off")
        runtime = replace(runtime, rank=0, world=1)  # this rank has the model alone
        engine.start(model, tok, runtime, quant, kv_tokens, kv_dtype, 16, max_seqs)
        return engine

    def start(
        self,
        model,
        tok,
        runtime,
        quant,
        kv_tokens,
        kv_dtype,
        block_size,
        max_seqs,
        step_tokens=None,
        max_model_len=None,
        prefix_cache=True,
        draft=None,
        draft_tokens=4,
        adapters=None,
        debug_invariants=False,
    ):
        self.model, self.tok = model, tok
        self.config, on_gpu, self.debug = (
            self.model.config,
            runtime.device.type == "cuda",
            debug_invariants,
        )
        max_seqs, step_tokens = (
            max_seqs or (256 if on_gpu else 64),
            step_tokens or (8192 if on_gpu else 512),
        )
        self.max_model_len = min(
            max_model_len or self.config.max_position_embeddings,
            self.config.max_position_embeddings,
        )
        self.runner = Runner(self.model, runtime, quant, kv_dtype, block_size, adapters)
        self.runners, self.drafter = [self.runner], None
        if draft and draft != "lookup" and runtime.rank == 0:  # small, and so on one rank
            small, small_tok, alone = load_model(draft, runtime.device, "auto", split=False)
            if small.config.vocab_size != self.config.vocab_size or (
                self.tok and small_tok and small_tok.vocab != self.tok.vocab
            ):
                raise UserError(
                    f"--draft {draft}: its vocabulary ({small.config.vocab_size:,} ids) is not that of this model "
                    f"({self.config.vocab_size:,}); a draft model must share the tokenizer"
                )
            self.max_model_len = min(self.max_model_len, small.config.max_position_embeddings)
            self.drafter = Runner(small, alone, quant, kv_dtype, block_size)
            self.runners.append(self.drafter)
        blocks = pool_size(self.runners, kv_tokens, block_size, max_seqs, self.max_model_len)
        for runner in self.runners:
            runner.allocate(blocks)
        if runtime.rank:
            self.runner.follow()
        self.max_model_len = min(self.max_model_len, blocks * block_size)
        self.scheduler = Scheduler(
            blocks, block_size, max_seqs, step_tokens, draft_tokens if draft else 0, prefix_cache
        )
        # ids that the model has rows for but the tokenizer does not know (padding) never come out
        self.vocab_size = (
            min(self.tok.vocab_size, self.config.vocab_size) if self.tok else self.config.vocab_size
        )
        eos = self.config.eos_token_id
        self.eos = frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])
        self.requests, self.outbox, self.arrivals = {}, [], itertools.count()

    # -- requests come in
    def encode(self, prompt):
        """str -> ids with the tokenizer's begin-of-text; ids are checked and passed on."""
        if isinstance(prompt, str):
            if self.tok is None:
                raise UserError("this model folder has no tokenizer, so prompts must be token ids")
            return self.tok.encode(prompt, bos=self.tok.bos_id is not None)
        for i in prompt:
            if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i!r} is not one of this model's 0 to {self.vocab_size - 1}"
                )
        return list(prompt)

    def submit(self, prompt, sampling, request_id=None, adapter=None):
        """Queue one request -> its id. Raises UserError, at once and with the numbers, for what cannot be done."""
        sampling.check(self.vocab_size)
        ids, room = self.encode(prompt), self.max_model_len
        if not ids:
            raise UserError("the prompt has no tokens; give at least one character")
        if len(ids) >= room:
            cache = len(self.scheduler.pool.refs) * self.scheduler.block_size
            raise UserError(
                f"the prompt has {len(ids):,} tokens, but this engine holds {room:,} (model context "
                f"{self.config.max_position_embeddings:,}, cache {cache:,}) and the answer needs at least one"
            )
        width = sampling.best_of or sampling.n
        if width > self.scheduler.max_seqs:
            raise UserError(
                f"{width} answers, but this engine makes at most {self.scheduler.max_seqs} at once"
            )
        if (
            sampling.stop or any(isinstance(w, str) for w in sampling.bad_words)
        ) and self.tok is None:
            raise UserError(
                "stop strings and bad words need a tokenizer; this model folder has none"
            )
        words = [
            tuple(w)
            for word in sampling.bad_words
            for w in (
                map(self.tok.encode, (word, " " + word)) if isinstance(word, str) else (word,)
            )
        ]
        if any(
            not w or not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in w)
            for w in words
        ):
            raise UserError(
                f"bad_words must be non-empty strings or lists of ids from 0 to {self.vocab_size - 1}"
            )
        request_id = next(self.arrivals) if request_id is None else request_id
        if request_id in self.requests:
            raise UserError(f"request id {request_id!r} is in use")
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos)
        edits = bool(
            sampling.counts_tokens
            or sampling.logit_bias
            or words
            or sampling.constraint
            or sampling.min_tokens
        )
        request = Request(
            request_id,
            ids,
            sampling,
            self.runner.adapter_row(adapter),
            ends,
            tuple(words),
            edits,
            unfinished=width,
        )
        seed = secrets.randbits(48) if sampling.seed is None else sampling.seed
        seq = Sequence(
            request,
            (next(self.arrivals), 0),
            list(ids),
            seed,
            self.tok and self.tok.stream(skip_special=True),
            copy.copy(sampling.constraint),
            width,
        )
        self.requests[request_id] = [seq]
        self.scheduler.counts["prompt_tokens"] += len(ids)
        self.scheduler.add(seq)
        return request_id

    def cancel(self, request_id):
        """Stop a request in whatever state it is and free all it holds; its answers end with "abort" in the next step."""
        for seq in self.requests.pop(request_id, ()):
            if seq.finish_reason is None:
                self.scheduler.remove(seq)
                self.outbox += [
                    Delta(request_id, seq.order[1] + i, "", [], None, "abort")
                    for i in range(seq.width)
                    if seq.order[1] + i < seq.request.sampling.n
                ]

    @property
    def has_work(self):
        return bool(self.outbox or self.scheduler.waiting or self.scheduler.running)

    # -- one step
    @torch.inference_mode()
    def step(self):
        """Compute one batch -> list of Delta. Never blocks on anything but the computation."""
        deltas, self.outbox = self.outbox, []
        with quiet_torch() if self.runner.native else contextlib.nullcontext():
            if plan := self.scheduler.schedule():
                for runner in self.runners if self.scheduler.copies else ():
                    runner.everywhere("copy_blocks", torch.tensor(self.scheduler.copies).flatten())
                drafts = self.propose(plan)
                deltas += self.accept(plan, drafts, *self.compute(plan, drafts))
        if self.debug:
            self.scheduler.check_invariants()
        return deltas

    def propose(self, plan):
        """{sequence: ids that may come next}, no more than the plan has room for."""
        if not self.scheduler.max_draft:
            return {}
        most = {
            s: min(n - 1, self.max_model_len - len(s.ids) - 1)
            for s, n in plan.items()
            if s.remaining == 1 and n > 1 and s.constraint is None
        }
        if self.drafter is None:
            return {s: find_draft(s.ids, k) for s, k in most.items() if k > 0}
        drafts = {s: [] for s, k in most.items() if k > 0}
        for _ in range(
            max(most.values(), default=0)
        ):  # each round adds one id to every draft, all in one batch
            live = [s for s in drafts if len(drafts[s]) < most[s]]
            batch = Batch(self.scheduler.block_size)
            for s in live:
                ids = s.ids + drafts[s]
                batch.add(
                    s.blocks,
                    ids[s.drafted :],
                    s.drafted,
                    [len(ids) - s.drafted - 1],
                    s.request.adapter,
                )
                s.drafted = len(ids)
            rows = [self.row(s, drafts[s]) for s in live]
            logits = self.drafter(batch)[:, : self.vocab_size]
            for s, token in zip(live, draw(logits, rows)[0].tolist()):
                drafts[s].append(token)
        return drafts

    def compute(self, plan, drafts):
        """Run the plan's tokens -> logits (R, V) and the sequences they are of, each with one row and one after each draft id."""
        batch, owners, catch_up = (
            Batch(self.scheduler.block_size),
            [],
            Batch(self.scheduler.block_size),
        )
        for seq, n in plan.items():
            n, draft = min(n, seq.remaining), drafts.get(seq, [])
            new, rows = seq.ids[seq.computed : seq.computed + n] + draft, []
            if seq.computed + n == len(
                seq.ids
            ):  # all known tokens: the next one can be drawn, and one after each draft
                rows = list(range(n - 1, n + len(draft)))
                owners.append(seq)
            batch.add(seq.blocks, new, seq.computed, rows, seq.request.adapter)
            if (
                self.drafter and seq not in drafts
            ):  # the draft model has to read what it did not propose from
                catch_up.add(
                    seq.blocks,
                    seq.ids[seq.drafted : seq.computed + n],
                    seq.drafted,
                    [],
                    seq.request.adapter,
                )
                seq.drafted = seq.computed + n
        if self.drafter and catch_up.ids:
            self.drafter(catch_up)
        logits = self.runner(batch)
        return (None if logits is None else logits[:, : self.vocab_size]), owners

    def row(self, seq, draft, index=None):
        """The sampler's view of one answer, `draft` further on."""
        r, s = seq.request, seq.request.sampling
        if s.temperature == 0 and not r.edits:  # nothing else matters
            return Row(s, 0.0)
        seed = seq.seed if index is None else child_seed(seq, index)
        output = seq.ids[len(r.prompt) :] + draft if r.edits else ()
        room = min(s.max_tokens, self.max_model_len - len(r.prompt)) - seq.made - len(draft)
        return Row(
            s,
            uniform(seed, len(seq.ids) + len(draft)),
            output,
            r.prompt,
            r.ends,
            r.bad_words,
            seq.constraint,
            room,
            r.edits,
        )

    def accept(self, plan, drafts, logits, owners):
        """Draw, keep drafts as far as they are what was drawn, turn tokens into text -> deltas.

        A draft is right exactly where it equals the token that the model itself drew with that position's random number, so
        speculation changes how many steps are taken and nothing else.
        """
        for seq, n in plan.items():
            seq.computed += min(n, seq.remaining)
            self.scheduler.publish(seq)
        if not owners:
            return []
        rows, source, at = [], [], 0
        for seq in owners:
            draft = drafts.get(seq, [])
            for i in range(len(draft) + 1):
                for index in range(
                    seq.width
                ):  # a prompt whose n answers begin now draws n times from the same row of logits
                    rows.append(self.row(seq, draft[:i], index if seq.width > 1 else None))
                    source.append(at)
                at += 1
        if len(source) > at:
            logits = logits[torch.tensor(source, device=logits.device)]
        wanted = [
            i
            for i, row in enumerate(rows)
            if row.sampling.logprobs is not None or row.sampling.best_of
        ]
        raw = logits[wanted].clone() if wanted else None
        tokens, failed = draw(logits, rows)
        info = (
            dict(zip(wanted, logprobs_of(raw, tokens[wanted], [rows[i] for i in wanted])))
            if wanted
            else {}
        )
        tokens, failed = tokens.tolist(), failed.tolist()
        deltas, at = [], 0
        for seq in owners:
            draft = drafts.get(seq, [])
            for answer in self.fork(seq) if seq.width > 1 else [seq]:
                new = []  # (token, its logprobs)
                for i in range(len(draft) + 1):
                    if failed[at + i]:
                        answer.finish_reason = "error"
                        answer.error = "no token is allowed here: constraint, bad words and min_tokens contradict each other"
                        break
                    new.append((tokens[at + i], info.get(at + i)))
                    if i == len(draft) or draft[i] != tokens[at + i]:
                        break
                deltas += self.extend(answer, new)
                at += len(draft) + 1
        return deltas

    def fork(self, seq):
        """The n answers of a prompt that has been computed: they share its blocks, and copy the last one when they write."""
        width, seq.width = seq.width, 1
        answers = [seq]
        for i in range(1, width):
            twin = replace(
                seq,
                order=(seq.order[0], i),
                ids=list(seq.ids),
                seed=child_seed(seq, i),
                blocks=list(seq.blocks),
                stream=self.tok and self.tok.stream(skip_special=True),
                constraint=copy.copy(seq.constraint),
                hashes=list(seq.hashes),
            )
            for block in twin.blocks:
                self.scheduler.pool.share(block)
            bisect.insort(self.scheduler.running, twin, key=lambda s: s.order)
            answers.append(twin)
        seq.seed = child_seed(seq, 0)
        self.requests[seq.request.id] = list(answers)
        return answers

    # -- tokens become text
    def extend(self, seq, new):
        """Append drawn tokens to an answer until it ends -> deltas (one, or with best_of those of the whole request)."""
        request, s, text, kept, known = seq.request, seq.request.sampling, "", [], len(seq.ids)
        for token, logprob in new:
            if token in request.ends:
                seq.finish_reason = "stop"
                break
            seq.ids.append(token)
            kept.append(logprob)
            seq.logprob_sum += logprob.logprob if logprob else 0.0
            if seq.stream:
                text += self.show(seq, seq.stream.push(token))
            if seq.constraint is not None:
                seq.constraint.advance(token)
                if seq.constraint.done:
                    seq.finish_reason = "stop"
            if seq.finish_reason is None and (
                seq.made == s.max_tokens or len(seq.ids) == self.max_model_len
            ):
                seq.finish_reason = "length"
            if seq.finish_reason:
                break
        ids = seq.ids[known:]
        self.scheduler.counts["generated_tokens"] += len(ids)
        # a draft model wrote keys for its whole draft; what was not accepted is to be written again
        seq.computed += max(len(ids) - 1, 0)
        seq.drafted = min(seq.drafted, seq.computed)
        if seq.finish_reason:
            if seq.stream and seq.held is not None:
                text += self.show(seq, seq.stream.flush()) + (seq.held or "")
            self.scheduler.remove(seq)
            request.unfinished -= 1
            if request.unfinished == 0:
                del self.requests[request.id]
        delta = Delta(
            request.id,
            seq.order[1],
            text,
            ids,
            kept if s.logprobs is not None else None,
            seq.finish_reason,
            seq.error,
        )
        return self.compare(seq, delta) if s.best_of and s.best_of > s.n else [delta]

    def show(self, seq, text):
        """New text -> what of it and of the text held back can be shown; a stop string ends the answer before itself."""
        stops = seq.request.sampling.stop
        if not stops or seq.held is None:  # None: stopped already
            return "" if stops else text
        text = seq.held + text
        found = min((at for at in map(text.find, stops) if at >= 0), default=None)
        if found is not None:
            seq.finish_reason, seq.held = "stop", None
            return text[:found]
        keep = max(
            (
                n
                for stop in stops
                for n in range(min(len(stop) - 1, len(text)), 0, -1)
                if text.endswith(stop[:n])
            ),
            default=0,
        )
        seq.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def compare(self, seq, delta):
        """best_of: answers are kept back until all are made; the n of the best mean log-probability come out, best first."""
        request = seq.request
        if delta.index in request.kept:
            request.kept[delta.index][1].add(delta)
        else:
            request.kept[delta.index] = seq, delta
        if request.unfinished:
            return []
        best = sorted(
            request.kept.values(),
            key=lambda kept: (-kept[0].logprob_sum / max(kept[0].made, 1), kept[1].index),
        )
        return [replace(delta, index=i) for i, (_, delta) in enumerate(best[: request.sampling.n])]

    # -- whole answers
    def generate(self, prompts, sampling=None):
        """prompts: one or a list of str or id lists; sampling: one for all or a list -> list of Output, in the prompts' order,
        the n answers of a prompt next to each other."""
        single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], int))
        prompts = [prompts] if single else list(prompts)
        samplings = (
            sampling
            if isinstance(sampling, (list, tuple))
            else [sampling or Sampling()] * len(prompts)
        )
        if len(samplings) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(samplings)} samplings")
        ids = [self.submit(p, s) for p, s in zip(prompts, samplings)]
        requests = {i: self.requests[i][0].request for i in ids}
        outputs = {
            (i, k): Output(
                i,
                k,
                "",
                [],
                None if r.sampling.logprobs is None else [],
                prompt_tokens=len(r.prompt),
            )
            for i, r in requests.items()
            for k in range(r.sampling.n)
        }
        try:
            while any(i in self.requests for i in ids) or self.outbox:
                for d in self.step():
                    if output := outputs.get((d.request_id, d.index)):
                        output.add(d)
                        output.cached_tokens = requests[d.request_id].cached_tokens
        except BaseException:  # an interrupt leaves the engine as it was
            for i in ids:
                self.cancel(i)
            raise
        return list(outputs.values())

    @torch.inference_mode()
    def embed(self, ids):
        """The mean over a text's tokens of the last hidden states (after the final norm), at length 1 -> list of C floats."""
        hidden = self.runner.everywhere("hidden", torch.tensor(ids)).mean(0)  # (T, C) -> (C,)
        return (hidden / hidden.norm()).tolist()

    @torch.inference_mode()
    def prompt_logprobs(self, ids, count):
        """What the model thought of a text itself -> a TokenLogprob for each of its tokens; of the first it thought nothing."""
        scores = self.runner.everywhere("score", torch.tensor([count, self.vocab_size, *ids]))
        return [
            TokenLogprob(ids[0], None, []),
            *(
                TokenLogprob(i, c, list(zip(t, v)))
                for i, c, v, t in zip(ids[1:], *(part.tolist() for part in scores))
            ),
        ]

    def stats(self):
        """Counters since the start and the state now, for /metrics."""
        s = self.scheduler
        return {
            "running": len(s.running),
            "waiting": len(s.waiting),
            "blocks_total": len(s.pool.refs),
            "blocks_used": len(s.pool.refs) - len(s.pool.free),
            **s.counts,
        }


def logprobs_of(logits, tokens, rows):
    """logits (R, V), tokens (R,) -> a TokenLogprob for each row."""
    counts = [row.sampling.logprobs or 0 for row in rows]
    chosen, values, ids = (t.tolist() for t in top_logprobs(logits, tokens, max(counts)))
    return [
        TokenLogprob(t, c, list(zip(i, v))[:n])
        for t, c, v, i, n in zip(tokens.tolist(), chosen, values, ids, counts)
    ]


def child_seed(seq, index):
    """The seed of one of n answers: a number of its own, the same in every run."""
    return int.from_bytes(
        hashlib.blake2b(b"%d/%d" % (seq.seed, index), digest_size=6).digest(), "little"
    )


if __name__ == "__main__":
    cli(main)
