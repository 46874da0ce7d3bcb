"""Text from a model folder or a GGUF file: one prompt, a conversation, or a file of prompts.

    python generate.py runs/shakespeare-char "ROMEO:" --temperature 0.8 --seed 1
    python generate.py runs/demo-dpo --chat                              # or with a question: its answer
    python generate.py runs/demo --batch prompts.jsonl --out answers.jsonl --max-tokens 100 --quant int8
    torchrun --nproc-per-node 2 generate.py MODEL "prompt"               # a model larger than one card, over two

A line of the batch file is {"prompt": text or ids} or {"messages": [...]}, with "id" and any field of Sampling as it likes.
`generate` below is the plain way to do it, one token of one text at a time; the engine (engine.py) gives the same, faster.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import chat
from common import UserError, cli, parse_flags, read_json
from engine.sampler import Sampling
from engine.scheduler import Delta, Engine, Output  # noqa: F401  names that other programs import from here
from runtime import lost_rank_explained


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


# ------------------------------------------------------------------------------------------------------- one token at a time
class KVCache:
    """The keys and values of one layer for all tokens so far, in room reserved at the start."""

    def __init__(self, config, batch, device, dtype, room=None):
        """room: tokens it can hold [the model's context]"""
        shape = (
            2,
            batch,
            config.num_key_value_heads,
            room or config.max_position_embeddings,
            config.head_dim,
        )
        self.kv, self.length = (
            torch.empty(shape, device=device, dtype=dtype),
            0,
        )  # (2, B, K, room, D)

    def append(self, k, v):
        """k, v (B, K, T, D) of new tokens -> those of all tokens, (B, K, length, D)."""
        end = self.length + k.size(2)
        self.kv[0, :, :, self.length : end], self.kv[1, :, :, self.length : end] = k, v
        self.length = end
        return self.kv[0, :, :, :end], self.kv[1, :, :, :end]


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token id per row of logits (B, V) float32 -> (B,) int64. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # nucleus sampling (Holtzman et al. 2020)
        ranked, order = logits.softmax(-1).sort(descending=True)
        before = (
            ranked.cumsum(-1) - ranked
        )  # probability of everything likelier; the first is always kept
        logits = logits.masked_fill(
            (before >= top_p).scatter(-1, order, before >= top_p), -torch.inf
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, ids, max_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, vocab_size=None):
    """Continue one list of token ids -> iterator of new ids; ends at the model's end-of-text or after max_tokens.

    vocab_size: the tokenizer's, where the model has rows for more ids (padding) that mean nothing. When the context is full, its
    older half is forgotten and the rest read again.
    """
    config, weight = model.config, model.embed_tokens.weight
    if not ids:
        raise UserError("the prompt has no tokens; give at least one character")
    generator = torch.Generator(weight.device).manual_seed(seed)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids, context, caches, new = list(ids), config.max_position_embeddings, None, []
    for _ in range(max_tokens):
        if caches is None or caches[0].length + len(new) > context:
            new = ids[-context:] if caches is None else ids[-(context // 2) :]
            room = min(context, len(ids) + max_tokens)
            caches = [KVCache(config, 1, weight.device, weight.dtype, room) for _ in model.layers]
        hidden = model.hidden(torch.tensor([new], device=weight.device), caches=caches)  # (1, T, C)
        logits = model.lm_head(hidden[:, -1]).float()  # (1, V): only the last position is asked for
        token = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator).item()
        if token in ends:
            return
        yield token
        ids.append(token)
        new = [token]


# --------------------------------------------------------------------------------------------------- prompt, chat and batch
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


if __name__ == "__main__":
    cli(main)
