"""Stand-in until the real one lands: character-level only."""
import json
from pathlib import Path

from common import UserError, sha256, write_json


class Tokenizer:
    def __init__(self, chars):
        self.chars, self.ids = chars, {c: i for i, c in enumerate(chars)}
        self.special, self.bos_id, self.eos_id, self.pad_id, self.chat_template = {}, None, None, None, None
        self.vocab_size = len(chars)

    @staticmethod
    def char(text, special_tokens=()):
        return Tokenizer(sorted(set(text)))

    def encode(self, text, bos=False, eos=False):
        bad = sorted(set(text) - set(self.ids))
        if bad:
            raise UserError(f"{''.join(bad)!r} not in this tokenizer's {len(self.ids)} characters: {''.join(self.chars)!r}")
        return [self.ids[c] for c in text]

    def decode(self, ids, skip_special=False):
        return "".join(self.chars[i] for i in ids)

    @property
    def sha256(self):
        return sha256(json.dumps(self.chars).encode())

    def token_bytes(self, id):
        return self.chars[id].encode()

    def save(self, folder):
        write_json(Path(folder) / "tokenizer.json", {"chars": self.chars})

    @staticmethod
    def load(path):
        p = Path(path)
        p = p / "tokenizer.json" if p.is_dir() else p
        if not p.is_file():
            raise UserError(f"{path}: no tokenizer.json")
        return Tokenizer(json.loads(p.read_text())["chars"])

    def stream(self):
        tok = self
        class S:
            def push(self, i): return tok.decode([i])
            def flush(self): return ""
        return S()
