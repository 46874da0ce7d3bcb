"""The chat page in real Chromium, against serve.py over a stub engine whose answers are known.

`make test-browser` runs it; SHOTS=docs MODEL=runs/demo-sft ADAPTER=runs/demo-lora also writes the
screenshots, with a real model. Needs playwright (PyPI), Chromium (apt-get install chromium, or
$CHROMIUM), and for the accessibility check axe-core: `npm pack axe-core && tar xf axe-core-*.tgz
package/axe.min.js`, its path in $AXE (default: package/axe.min.js).
"""

import json
import math
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from serving import running

from chat import CHATML_TEMPLATE
from engine.scheduler import Delta, TokenLogprob
from tokenizer import Tokenizer

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
SHOTS = os.environ.get("SHOTS")

ATTENTION = """**Attention** lets each token look back at the tokens before it, and take from them \
what it needs.

Three vectors are made from every token:

1. a *query*: what it is looking for,
2. a *key*: what it offers to others,
3. a *value*: what is passed on when query and key match.

```python
def attention(q, k, v):
    # how well each query matches each key, as shares that sum to 1
    weights = softmax(q @ k.T / sqrt(q.shape[-1]))
    return weights @ v
```

The division by the square root of the size keeps `softmax` from becoming too sharp \
(Vaswani et al. 2017)."""
STORY = (
    "The lighthouse keeper counted the waves until the fog came in. She lit the lamp, poured two "
    "cups of tea and waited for the boat that was never late. At nine the bell rang twice, and "
    "somewhere in the white a voice sang back."
)
POEM = """Each word looks back along the line
and asks of all the words before:
*which one of you has what is mine?*
They answer, some less and some more.

What matches most is carried on,
the rest is left, but never gone."""
EVIL = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> \
[click](javascript:window.hacked=3)
[data](data:text/html,<script>window.hacked=4</script>) ![i](https://example.com/x.png) \
<javascript:window.hacked=5>

```html
<img src=x onerror="window.hacked = 6">
```
| a | <svg onload="window.hacked=7"> |
|---|---|
| [x](JaVaScRiPt:window.hacked=8) | [y](&#106;avascript:window.hacked=9) |"""
MARKDOWN = """# Title
Keep snake_case_names and __init__ alone, but *lean* and **bold** and `a_b`.

- one
  - nested
- two

A table:
| left | right |
|------|-------|
| 1 | 2 |

> quoted

See [the paper](https://arxiv.org/abs/1706.03762) or https://example.com/a_b.

```js
let open = ["fence", 2];"""
ANSWERS = {
    "attention": ATTENTION,
    "story": STORY,
    "evil": EVIL,
    "markdown": MARKDOWN,
    "emoji": "Hi 🙂👩‍👩‍👧 日本語 ✓ done",
    "forever": "tick " * 2000,
    "long": "\n\n".join(f"Paragraph {i}, with a few words in it." for i in range(60)),
}


class StubEngine:
    """Answers by the key word in the last user message, a token a step; the adapter "poet" answers
    with a poem, greedy or not."""

    max_model_len = 4096
    sampling_defaults: dict = {}

    def __init__(self, chat=True, delay=0.002):
        text = "\n".join(
            [ATTENTION, STORY, EVIL, MARKDOWN, ANSWERS["long"], POEM, " tick you said the answer"]
        )
        self.tok, self.delay, self.running, self.seen, self.lock = (
            Tokenizer.train([text], 700),
            delay,
            {},
            [],
            threading.Lock(),
        )
        if chat:
            self.tok.chat_template = CHATML_TEMPLATE
        self.end = self.tok.special["<|im_end|>"]
        self.bytes = [
            i
            for i in range(self.tok.vocab_size)
            if (self.tok.token_bytes(i) or b"")[:1] in (b"\xe6", b"\xf0", b"\xe2")
        ]
        self.words = [
            i
            for i in range(self.tok.vocab_size)
            if re.fullmatch(rb" [a-zA-Z]{3,}", self.tok.token_bytes(i) or b"")
        ]

    def plan(self, prompt, adapter):
        """What to answer: as ids, without what the prompt holds of it already."""
        text = self.tok.decode(prompt)
        asked, marked, begun = text.rpartition("<|im_start|>assistant\n")
        if not marked:
            return self.tok.encode(" and so it went on")
        said = asked.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n")
        answer = next((a for k, a in ANSWERS.items() if k in said), f"You said: {said}")
        answer = (
            POEM if adapter and "attention" in said else "A poem on " + said if adapter else answer
        )
        left = (
            answer[len(begun) :]
            if answer.startswith(begun)
            else " and that is another way to say it."
        )
        return self.tok.encode(left) + [self.end]

    def submit(self, prompt, sampling, request_id=None, adapter=None):
        self.seen.append((prompt, sampling, adapter))
        self.running[request_id] = [
            self.plan(prompt, adapter),
            0,
            sampling,
            self.tok.stream(skip_special=True),
        ]
        return request_id

    @property
    def has_work(self):
        return bool(self.running)

    def logprob(self, i, at, count):
        """The chosen token among whole words, mostly the likeliest."""
        p = (0.97, 0.62, 0.93, 0.21, 0.85, 0.99, 0.07, 0.9, 0.4)[(i + at) % 9]
        pool = self.words if self.tok.decode([i]).isascii() else self.bytes
        others = [o for k in range(count - 1) if (o := pool[(i * 7 + k * 31) % len(pool)]) != i]
        top = [(i, math.log(p))] + [
            (o, math.log((1 - p) * 0.5 ** (k + 1))) for k, o in enumerate(others)
        ]
        return TokenLogprob(i, math.log(p), sorted(top, key=lambda t: -t[1]))

    def step(self):
        time.sleep(self.delay)
        deltas = []
        for rid, state in list(self.running.items()):
            ids, at, sampling, stream = state
            i = ids[at]
            state[1] += 1
            reason = (
                "stop"
                if state[1] == len(ids)
                else "length"
                if state[1] >= sampling.max_tokens
                else None
            )
            text = stream.push(i) + (stream.flush() if reason else "")
            logprobs = [self.logprob(i, at, sampling.logprobs)] if sampling.logprobs else []
            deltas.append(Delta(rid, 0, text, [i], logprobs, reason))
            if reason:
                del self.running[rid]
        return deltas

    def cancel(self, request_id):
        self.running.pop(request_id, None)

    def stats(self):
        return dict(
            running=len(self.running),
            waiting=0,
            blocks_used=0,
            blocks_total=64,
            prompt_tokens=0,
            generated_tokens=0,
            preemptions=0,
            cache_hit_tokens=0,
            cache_query_tokens=0,
            longest_wait=0.0,
        )

    def read(self, ids, count=None):
        yield [1.0]


def serve(engine, keys=None, runs="runs", name="demo-135m", adapters="poet=adapters/poet"):
    return running(engine, keys, model=name, adapters=adapters, runs=str(runs))


def write_run(folder, steps, level):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(0, steps, 10):
        wave = 0.09 * math.sin(step * 1.7) + 0.06 * math.sin(step * 5.3)
        smooth = level + 6.2 * math.exp(-step / 260) + 1.1 * math.exp(-step / 1500)
        if step % 250 == 0 and step:
            rows.append(
                dict(
                    step=step,
                    seconds=step * 0.31,
                    val_loss=smooth + 0.07,
                    perplexity=math.exp(smooth + 0.07),
                )
            )
        rows.append(
            dict(
                step=step,
                seconds=step * 0.31 + 0.1,
                loss=smooth + wave,
                lr=min(1, step / 200) * (1 - step / 4000),
                skipped=0,
                grad_norm=0.6 + 2 * math.exp(-step / 150) + abs(wave),
                tokens_per_s=51000 + 1800 * math.sin(step * 0.9),
            )
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def engine():
    return StubEngine()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "wide-lr", 1800, 3.05)
    time.sleep(0.02)
    write_run(folder / "pretrain-125m", 2600, 2.9)
    return folder


@pytest.fixture(scope="module")
def address(engine, runs):
    with serve(engine, runs=runs) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.fail("no Chromium: apt-get install chromium, or give its path in $CHROMIUM")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(
        viewport={"width": 1240, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(20000)
    yield context
    context.close()


@pytest.fixture
def page(context, address):
    """A fresh page; what its script throws fails the test."""
    page = context.new_page()
    wrong = []
    asked = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    visit(page, address)
    yield page
    assert not wrong
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)


def visit(page, address):
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")


def ask(page, text, wait=True):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        idle(page)


def idle(page):
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_timeout(50)


BOTH_FINISHED = """(() => {
    const finished = f => f.textContent.includes("finished");
    return [...document.querySelectorAll(".side .facts")].every(finished);
})()"""
# How many pixels of the conversation lie below what is shown.
BELOW = """() => {
    const b = document.querySelector("#scroll");
    return b.scrollHeight - b.scrollTop - b.clientHeight;
}"""


def until(page, expression):
    """Wait until it is true in the page (Playwright's own wait needs eval, which the page's
    security policy forbids)."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def answer(page, nth=-1):
    return page.locator("article.assistant").nth(nth)


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(exist_ok=True)
        page.screenshot(path=f"{SHOTS}/ui-{name}.png")


# --------------------------------------------------------------------------------------------- chat
def test_an_answer_streams_in_and_says_how_it_ended(page):
    ask(page, "attention please", wait=False)
    until(page, "document.querySelector('article.assistant .body')?.textContent.length > 20")
    assert page.is_visible("#stop")
    assert answer(page).get_attribute("aria-busy") == "true"
    idle(page)
    facts = answer(page).locator(".facts").inner_text()
    assert re.fullmatch(r"[\d.]+ tok/s · \d+ tokens · first after .+ · finished", facts)
    assert answer(page).locator(".body").inner_text().startswith("Attention lets each token")
    assert re.match(r"\d+ of 4,096 tokens of context", page.inner_text("#room"))
    shot(page, "light")


def test_characters_of_many_bytes_arrive_whole(page):
    ask(page, "emoji")
    assert answer(page).locator(".text").inner_text() == ANSWERS["emoji"]


def test_stop_ends_the_answer_here_and_in_the_engine(page, engine):
    for end in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        ask(page, "forever", wait=False)
        until(page, "document.querySelector('#speed').textContent.match(/\\d\\d tokens/)")
        end()
        idle(page)
        assert "stopped by you" in answer(page).locator(".facts").inner_text()
        for _ in range(40):
            if not engine.running:
                break
            time.sleep(0.05)
        assert not engine.running


def test_an_answer_that_was_cut_can_be_continued(page, engine):
    page.click("#gear")
    page.fill("#s-max_tokens", "9")
    ask(page, "story")
    begun = answer(page).locator(".text").inner_text()
    assert "length limit" in answer(page).locator(".facts").inner_text()
    assert STORY.startswith(begun)
    assert begun != STORY
    page.fill("#s-max_tokens", "")
    page.click("#tokens")  # from here on each token has its probability, but not from the first
    answer(page).get_by_label("Continue this answer").click()
    idle(page)
    assert answer(page).locator(".text").inner_text() == STORY
    whole = len(engine.seen[-1][0]) + len(engine.tok.encode(STORY.removeprefix(begun))) + 1
    assert page.inner_text("#room").startswith(f"{whole} of 4,096")


def test_regenerating_keeps_the_versions(page):
    ask(page, "story")
    answer(page).get_by_label("Regenerate").click()
    idle(page)
    assert answer(page).locator(".pages").inner_text().split() == ["2", "/", "2"]
    answer(page).get_by_label("Previous version").click()
    assert answer(page).locator(".pages").inner_text().split() == ["1", "/", "2"]


def test_editing_a_message_branches_and_the_old_branch_stays(page):
    ask(page, "first question")
    ask(page, "second question")
    first = page.locator("article.user").first
    first.hover()
    first.get_by_label("Edit").click()
    page.fill("article textarea", "changed question")
    page.click("text=Send as a new version")
    idle(page)
    texts = page.locator("article.user .body").all_inner_texts()
    assert texts == ["changed question"]
    assert "You said: changed question" in answer(page).inner_text()
    page.locator("article.user").first.get_by_label("Previous version").click()
    assert page.locator("article.user .body").all_inner_texts() == [
        "first question",
        "second question",
    ]
    page.reload()
    assert page.locator("article.user .body").all_inner_texts() == [
        "first question",
        "second question",
    ]


def test_an_answer_can_be_edited_without_asking_again(page, engine):
    ask(page, "story")
    before = len(engine.seen)
    answer(page).get_by_label("Edit").click()
    page.fill("article textarea", "My own words")
    page.click("text=Save as a new version")
    assert answer(page).locator(".text").inner_text() == "My own words"
    assert len(engine.seen) == before
    ask(page, "go on")
    assert "My own words" in engine.tok.decode(engine.seen[-1][0])


def test_copy_puts_the_source_on_the_clipboard(page):
    ask(page, "attention")
    answer(page).get_by_label("Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == ATTENTION
    answer(page).get_by_label("Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith(
        "def attention(q, k, v):\n    # how"
    )


def test_example_prompts_are_sent_with_a_click(page):
    page.locator(".examples button").first.click()
    idle(page)
    assert page.locator("article").count() == 2


def begin(page):
    """An answer that goes on until it is stopped."""
    ask(page, "forever", wait=False)
    until(page, "document.querySelector('#speed').textContent.match(/\\d\\d tokens/)")


def test_while_an_answer_is_made_another_is_refused_in_words_and_nothing_is_lost(page):
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    ask(page, "story")
    ask(page, "attention")
    begin(page)
    page.get_by_role("button", name="Try again").click()
    answer(page, 1).get_by_label("Regenerate").click()
    page.wait_for_selector("#toast:has-text('An answer is being made')")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_label("Edit").click()
    page.fill("article textarea", "changed")
    page.click("text=Send as a new version")
    assert page.input_value("article textarea") == "changed"
    page.click("#stop")
    idle(page)
    assert page.locator(".pages").count() == 0
    page.click("text=Send as a new version")
    idle(page)
    assert "You said: changed" in answer(page).inner_text()


def test_a_question_is_kept_before_its_answer_begins(page):
    page.route("**/v1/chat/completions", lambda route: None)  # reads the prompt, for ever
    ask(page, "my long question", wait=False)
    page.wait_for_selector("article.waiting")
    page.reload()
    assert page.locator("article.user .body").inner_text() == "my long question"


def test_another_tab_disturbs_neither_an_edit_nor_the_view(page, context, address):
    ask(page, "about apples")
    other = context.new_page()
    visit(other, address)
    other.locator("#chats .open").click()
    page.locator("article.user").hover()
    page.locator("article.user").get_by_label("Edit").click()
    page.fill("article textarea", "about pears")
    ask(other, "and plums")
    other.click("#new")
    ask(other, "about figs")
    until(page, "document.querySelectorAll('#chats li').length === 2")
    assert page.input_value("article textarea") == "about pears"
    page.click("text=Send as a new version")
    idle(page)
    assert "You said: about pears" in answer(page).inner_text()
    page.locator("article.user").get_by_label("Previous version").click()
    assert page.locator("article.user .body").all_inner_texts() == ["about apples", "and plums"]
    page.click("[data-view=training]")
    page.wait_for_selector("figure.first")
    ask(other, "more figs")
    page.wait_for_timeout(200)
    assert page.is_visible("#view-training")


# ------------------------------------------------------------------------------------ conversations
def test_conversations_survive_a_reload_and_can_be_renamed_and_deleted(page):
    ask(page, "about apples")
    page.keyboard.press("Control+k")
    assert page.locator("article").count() == 0
    ask(page, "about pears")
    page.reload()
    assert page.locator("#chats .open").all_inner_texts() == ["about pears", "about apples"]
    assert page.locator("article").count() == 2
    page.get_by_text("about apples").hover()
    page.get_by_label("Rename about apples").click()
    page.fill("#chats input", "Fruit")
    page.press("#chats input", "Enter")
    page.get_by_text("about pears").first.hover()
    page.get_by_label("Delete about pears").click()
    page.reload()
    assert page.locator("#chats .open").all_inner_texts() == ["Fruit"]


def test_a_name_is_typed_on_while_an_answer_ends(page):
    begin(page)
    page.locator("#chats .open").hover()
    page.get_by_label("Rename forever").click()
    page.fill("#chats input", "Clo")
    page.evaluate("stop()")
    idle(page)
    page.keyboard.type("cks")
    page.keyboard.press("Enter")
    assert page.locator("#chats .open").inner_text() == "Clocks"


def test_a_deleted_conversation_can_be_brought_back(page):
    ask(page, "about plums")
    page.locator("#chats .open").hover()
    page.get_by_label("Delete about plums").click()
    assert page.locator("#chats li").count() == 0
    page.wait_for_timeout(7500)  # no sentence stays that long, an offer does
    page.click("text=Undo")
    assert page.locator("#chats li").count() == 1
    assert page.locator("article").count() == 2


def test_export_and_import_round_trip_with_every_branch(page, tmp_path):
    page.click("#tokens")
    ask(page, "story")
    answer(page).get_by_label("Regenerate").click()
    idle(page)
    ask(page, "and then")
    keep = """() => {
        function tree(chat, id) {
            const n = chat.nodes[id];
            const children = n.children.map(child => tree(chat, child));
            return [n.role, n.content, n.pick, n.finish || "", n.tokens ?? null, children];
        }
        return [...chats.values()].filter(c => path(c).length).map(c => tree(c, "root"));
    }"""
    before = page.evaluate(keep)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "c.json")
    page.evaluate("localStorage.clear()")
    page.goto("about:blank")
    page.go_back()
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#chats li").count() == 0
    page.set_input_files("#file", tmp_path / "c.json")
    page.wait_for_selector("#chats li")
    assert page.evaluate(keep) == before
    assert page.locator("article").count() == 4


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"format": "conversations", "chats": [{"nodes": 3}]}',
        '{"format": "conversations", "chats": [null]}',
    ],
)
def test_a_file_that_is_no_export_is_refused_in_words(page, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    page.set_input_files("#file", tmp_path / "bad.json")
    page.wait_for_selector("#toast:has-text('bad.json cannot be imported')")
    assert page.locator("#chats li").count() == 0


def test_an_import_with_a_cycle_or_foreign_keys_is_cut_to_a_tree(page):
    count = page.evaluate("""() => {
        const a = {role: "user", content: "x", children: ["b"]};
        const b = {role: "assistant", content: "y", children: ["a", "root"], tokens: [1]};
        const root = {children: ["a", "__proto__", "zz"]};
        const c = clean({nodes: {root, a, b, lone: {role: "user"}}});
        return [Object.keys(c.nodes).length, path(c).map(n => n.content)]; }""")
    assert count == [3, ["x", "y"]]


def test_a_full_storage_is_said_and_does_not_stop_the_chat(page):
    page.evaluate("""() => {
        const full = () => { throw new DOMException("full", "QuotaExceededError"); };
        Storage.prototype.setItem = full;
    }""")
    ask(page, "story")
    assert answer(page).locator(".text").inner_text() == STORY
    assert "storage is full" in page.inner_text("#toast")
    page.evaluate("toast('nothing')")
    page.evaluate("""() => {
        const chat = {nodes: {root: {children: ["a"]}, a: {role: "user", content: "x"}}};
        const text = JSON.stringify({format: "conversations", chats: [chat]});
        return importChats(new File([text], "c.json"));
    }""")
    assert "storage is full" in page.inner_text("#toast")


def test_without_storage_the_page_still_talks(context, address):
    page = context.new_page()
    page.add_init_script("""for (const kind of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, kind, {get() { throw new DOMException("switched off"); }});
    """)
    visit(page, address)
    ask(page, "story")
    assert answer(page).locator(".text").inner_text() == STORY


# ----------------------------------------------------------------------------------------- settings
def test_system_prompt_and_sampling_reach_the_engine(page, engine):
    page.click("#gear")
    page.fill("#system", "Be brief.")
    for name, value in {
        "temperature": "0.3",
        "top_p": "0.9",
        "top_k": "40",
        "seed": "7",
        "max_tokens": "50",
    }.items():
        page.fill(f"#s-{name}", value)
    page.fill("#s-stop", "END")
    page.fill("#s-min_p", "3")
    ask(page, "hello")
    assert page.inner_text("#toast").startswith("Min-p: Value must be less than or equal to 1.")
    prompt, sampling, _ = engine.seen[-1]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in engine.tok.decode(prompt)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (
        0.3,
        0.9,
        40,
        7,
    )
    assert (sampling.max_tokens, sampling.stop) == (50, ("END",))


def test_an_adapter_is_chosen_as_a_model(page, engine):
    page.select_option("#model", "poet")
    ask(page, "rain")
    assert engine.seen[-1][2] == "poet"
    assert "A poem on rain" in answer(page).inner_text()


def test_themes_change_colours_and_last(page):
    colours = set()
    for name in ("light", "sepia", "dark", "midnight"):
        page.select_option("#theme", name)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 4
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "midnight"
    page.select_option("#theme", "auto")
    page.emulate_media(color_scheme="dark")
    until(page, "document.documentElement.dataset.theme === 'dark'")


def test_a_key_is_asked_for_and_kept_for_the_tab_only(context):
    with serve(StubEngine(), keys={"s3cret": "me"}) as server:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#toast:has-text('needs an API key')")
        page.fill("#key", "schlüssel–")  # no header can carry it
        page.press("#key", "Tab")
        page.wait_for_selector("#toast:has-text('A key has only')")
        assert page.evaluate("sessionStorage['api-key']") is None
        page.fill("#key", "s3cret")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        ask(page, "hello")
        assert "You said: hello" in answer(page).inner_text()
        assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("sessionStorage['api-key']") == "s3cret"


# ------------------------------------------------------------------------------------------- errors
def test_an_error_is_told_in_words_and_retried(page, address):
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=429,
            headers={"Retry-After": "3"},
            json={"error": {"message": "the queue is full"}},
        ),
    )
    ask(page, "story")
    assert (
        page.locator("[role=alert]").inner_text().startswith("The queue is full. Try again in 3 s.")
    )
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    idle(page)
    assert answer(page).locator(".text").inner_text() == STORY
    assert page.locator("[role=alert]").count() == 0


def test_a_server_that_is_gone_is_told_in_words(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "story")
    assert "cannot be reached" in page.locator("[role=alert]").inner_text()


def test_a_stream_that_breaks_off_keeps_what_came(page):
    choice = {"index": 0, "delta": {"content": "half an ans"}, "token_ids": [9]}
    chunk = f"data: {json.dumps({'choices': [choice]})}\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=chunk),
    )
    ask(page, "story")
    assert "half an ans" in answer(page).inner_text()
    assert "closed before" in page.locator("[role=alert]").inner_text()
    page.unroute("**/v1/chat/completions")
    answer(page).get_by_role("button", name="Continue this answer").click()
    idle(page)
    assert re.match("half an ans.+", answer(page).locator(".text").inner_text())
    assert page.locator("[role=alert]").count() == 0
    assert page.locator(".pages").count() == 0


def test_trying_again_keeps_what_came_as_a_version(page):
    event = {"choices": [{"delta": {"content": "half an ans"}, "token_ids": [9]}]}
    broken = f"data: {json.dumps(event)}\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=broken),
        times=1,
    )
    ask(page, "story")
    page.get_by_role("button", name="Try again").click()
    idle(page)
    assert answer(page).locator(".text").inner_text() == STORY
    answer(page).get_by_label("Previous version").click()
    assert answer(page).locator(".text").inner_text() == "half an ans"


def test_a_prompt_that_is_too_long_is_told_with_the_numbers(page):
    ask(page, "word " * 5000)
    assert re.search(
        r"prompt has [\d,]+ tokens, the context is 4,096", page.locator("[role=alert]").inner_text()
    )


# ----------------------------------------------------------------------------------------- markdown
def test_model_output_never_becomes_code(page):
    ask(page, "evil")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    body = answer(page).locator(".body")
    assert body.locator("script, img, svg[onload], iframe").count() == 0
    links = body.locator("a").evaluate_all("all => all.map(a => a.protocol)")
    assert set(links) <= {"https:"}
    assert "<script>window.hacked = 1</script>" in body.inner_text()
    for text in ("text=click", "text=x", "text=data"):
        body.locator(text).first.click()
    page.click("#tokens")
    page.reload()
    page.click("#tokens")
    assert page.evaluate("window.hacked") is None


# 16 KB each, on which patterns that look far for the end of a mark take seconds.
MARKDOWN_BOMBS = ["[a](", "[a]( ", "[", "**a ", "__a ", "~~a ", "*a ", "`a", "**~~__*_", "- - "]
MARKDOWN_BOMBS = [mark * (16384 // len(mark)) for mark in MARKDOWN_BOMBS]
MARKDOWN_BOMBS += ["[a](" + " " * 16384, "a" + " " * 16384 + "b", "# a" + " " * 16384 + "b"]
MARKDOWN_BOMBS += ["a|b\n" + " " * 16384 + "x|", "http://" + "," * 16384]


def test_no_answer_of_16_kb_blocks_the_page(page):
    for text in MARKDOWN_BOMBS:
        took = page.evaluate(
            """text => {
                const begin = performance.now();
                markdown(document.createElement("div"), text);
                return performance.now() - begin;
            }""",
            text,
        )
        assert took < 1000, (text[:20], took)


def test_an_answer_in_one_piece_has_no_speed(page):
    event = {"choices": [{"delta": {"content": "a b c"}, "token_ids": [1]}]}
    last = {"choices": [{"delta": {"content": "."}, "token_ids": [2], "finish_reason": "stop"}]}
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in [event] * 60 + [last])
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body=body + "data: [DONE]\n\n"
        ),
    )
    ask(page, "story")
    facts = answer(page).locator(".facts").inner_text()
    assert "61 tokens" in facts and "tok/s" not in facts


def test_before_the_first_token_there_is_no_speed(page):
    rate = page.evaluate("""async () => {
        const head = {choices: [{delta: {role: "assistant"}}]};
        const answer = {content: "", ids: []};
        const rates = [];
        window.fetch = async () => new Response(`data: ${JSON.stringify(head)}\n\n`);
        await stream(answer, {where: "/", body: {}}, new AbortController(), () => {
            rates.push(answer.rate);
        });
        return rates;
    }""")
    assert rate == [0, 0]


def test_markdown_is_drawn_and_names_stay_whole(page):
    ask(page, "markdown")
    text = answer(page).locator(".text")
    assert text.locator("h3").inner_text() == "Title"
    assert "snake_case_names and __init__ alone" in text.inner_text()
    assert text.locator("em").all_inner_texts() == ["lean"]
    assert text.locator("strong").all_inner_texts() == ["bold"]
    assert text.locator("li li").inner_text() == "nested"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    links = text.locator("a").evaluate_all(
        "all => all.map(a => [a.href, a.rel.includes('noopener')])"
    )
    assert links == [["https://arxiv.org/abs/1706.03762", True], ["https://example.com/a_b", True]]
    assert text.locator("pre code").inner_text() == 'let open = ["fence", 2];'
    assert text.locator("blockquote").inner_text() == "quoted"


def test_markdown_of_any_text_ends_and_loses_no_letter(page):
    """Fuzzed: no input hangs the renderer or throws, drawing in steps gives what drawing at once
    gives, and no word is lost."""
    page.evaluate("""() => {
      let seed = 7;
      const r = n => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
      const bits = ["**", "*", "_", "`", "```", "\\n", "\\n\\n", "- ", "1. ", "> ", "# ", "|",
        "|-|", "[", "](", ")", "http://a.b", "word", " ", "  ", "\\\\", "~~", "<b>", "\\t", "é",
        "🙂", "---"];
      const count = where => (where.match(/🙂/g) ?? []).length;
      for (let k = 0; k < 500; k++) {
        const text = Array.from({length: r(40)}, () => bits[r(bits.length)]).join("");
        const grown = h("div");
        for (let i = 0; i <= text.length; i += 7) markdown(grown, text.slice(0, i));
        markdown(grown, text);
        const once = h("div");
        markdown(once, text);
        if (grown.textContent !== once.textContent)
          throw new Error("steps differ: " + JSON.stringify(text));
        const plain = !["```", "|", "]("].some(m => text.includes(m));
        if (plain && count(once.textContent) !== count(text))
          throw new Error("lost: " + JSON.stringify(text));
      }
      const begin = performance.now();
      for (const c of ["*", "_", "`", "[", "**a ", "~~", "> ", "- "])
        markdown(h("div"), c.repeat(4000));
      if (performance.now() - begin > 4000) throw new Error("slow");
    }""")


# ------------------------------------------------------------------------------------------- tokens
def test_token_view_shades_and_lists_the_alternatives(page):
    page.click("#tokens")
    ask(page, "story")
    tokens = answer(page).locator(".tok")
    assert "".join(t.replace("↵", "") for t in tokens.all_inner_texts()[:-1]).strip() == STORY
    assert (
        len(set(tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")))
        > 3
    )
    tokens.nth(3).hover()
    rows = page.locator("#alternatives button")
    assert page.is_visible("#alternatives")
    assert rows.count() >= 5
    assert page.locator("#alternatives button[aria-current]").count() == 1
    page.mouse.move(5, 5)
    page.wait_for_selector("#alternatives", state="hidden")


def test_choosing_an_alternative_continues_from_there(page, engine):
    page.click("#tokens")
    ask(page, "story")
    texts = answer(page).locator(".tok").all_inner_texts()
    answer(page).locator(".tok").nth(4).click()
    row = page.locator("#alternatives button:not(:disabled)").first
    chosen = row.locator("span").first.inner_text().replace("·", " ").replace("↵", "\n")
    row.click()
    idle(page)
    prompt, sampling, _ = engine.seen[-1]
    begun = engine.tok.decode(prompt).rpartition("assistant\n")[2]
    assert begun == "".join(texts[:4]) + chosen
    assert sampling.logprobs
    assert answer(page).locator(".pages").inner_text().split() == ["2", "/", "2"]
    shown = "".join(answer(page).locator(".tok").all_inner_texts()[:-1]).replace("↵", "")
    assert shown == begun + " and that is another way to say it."
    answer(page).locator(".tok").nth(8).click()  # again, in what came as a completion
    page.locator("#alternatives button:not(:disabled)").first.click()
    idle(page)
    assert answer(page).locator(".pages").inner_text().split() == ["3", "/", "3"]


def test_an_alternative_within_a_character_is_gone_on_from(page, engine):
    page.click("#tokens")
    ask(page, "emoji")
    part = next(i for i, t in enumerate(answer(page).locator(".tok").all_inner_texts()) if t == "‥")
    answer(page).locator(".tok").nth(part).click()
    page.locator("#alternatives button:not(:disabled)", has_text="bytes:").first.click()
    idle(page)
    prompt = engine.seen[-1][0]
    assert engine.tok.token_bytes(prompt[-1]) and "\ufffd" in engine.tok.decode(
        prompt
    )  # it ends within a character
    assert answer(page).locator(".tok").count() > part + 3
    assert "\ufffd" not in page.locator("#log").inner_text()


def test_the_alternatives_go_where_their_token_goes(page):
    page.click("#tokens")
    ask(page, "attention")
    page.set_viewport_size({"width": 700, "height": 600})
    token = answer(page).locator(".tok").first
    token.focus()
    page.keyboard.press("End")  # which scrolls
    page.wait_for_timeout(400)
    assert page.is_visible("#alternatives")
    page.evaluate("document.querySelector('#scroll').scrollTop -= 40")
    page.wait_for_timeout(100)
    apart = page.evaluate("""() => {
        const box = document.querySelector("#alternatives").getBoundingClientRect();
        const token = document.querySelector(".tok.on").getClientRects()[0];
        return Math.max(box.top - token.bottom, token.top - box.bottom);
    }""")
    assert 5 < apart < 7
    page.evaluate("document.querySelector('#alternatives').token.remove()")
    page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    page.wait_for_selector("#alternatives", state="hidden")


def test_the_tokens_can_be_walked_with_the_keyboard(page):
    page.click("#tokens")
    ask(page, "story")
    answer(page).locator(".tok").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert (
        page.evaluate("[...document.querySelectorAll('.tok')].indexOf(document.activeElement)") == 3
    )
    assert page.is_visible("#alternatives")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#alternatives') !== null")
    page.keyboard.press("Escape")
    assert page.is_hidden("#alternatives")
    assert page.evaluate("document.activeElement.className").startswith("tok")


# -------------------------------------------------------------------------------- compare, training
def test_compare_asks_two_models_the_same(page, engine):
    page.click("[data-view=compare]")
    page.get_by_label("Model of B").select_option("poet")
    page.get_by_label("Temperature of B").fill("0")
    page.get_by_label("System prompt of A").fill("Be kind.")
    page.fill("#question", "snow")
    page.press("#question", "Enter")
    until(page, BOTH_FINISHED)
    left, right = page.locator(".side .answer").all_inner_texts()
    assert "You said: snow" in left
    assert "A poem on snow" in right
    last = {a: (engine.tok.decode(p), s.temperature) for p, s, a in engine.seen[-2:]}
    assert "Be kind." in last[None][0]
    assert "Be kind." not in last["poet"][0]
    assert (last[None][1], last["poet"][1]) == (0.8, 0)
    page.evaluate("connect()")  # as after another key
    page.wait_for_timeout(200)
    assert page.get_by_label("System prompt of A").input_value() == "Be kind."
    page.fill("#question", "forever")
    page.click("#ask-both")
    until(page, "document.querySelector('.side .facts').textContent.includes('tokens')")
    page.click("#stop-both")
    until(page, "document.querySelector('.side .facts').textContent.includes('stopped by you')")
    assert page.is_hidden("#stop-both")
    assert page.evaluate("document.activeElement.id") == "question"


def test_training_curves_are_drawn_and_grow_while_a_run_writes(page, runs):
    page.click("[data-view=training]")
    page.wait_for_selector("figure.first svg polyline")
    label = page.locator("figure.first svg").get_attribute("aria-label")
    assert "pretrain-125m training from" in label
    assert "validation" in label
    titles = [t.split("\n")[0] for t in page.locator("figcaption").all_inner_texts()]
    assert titles[0].startswith("Loss")
    assert {"Tokens per second", "Gradient norm"} <= set(titles)
    assert page.locator("figure.first circle").count() == 10
    page.get_by_role("checkbox", name="wide-lr").check()
    until(page, "document.querySelectorAll('figure.first polyline').length == 6")
    page.locator("figure.first svg").hover()
    assert "step" in page.locator("figure.first .read").inner_text()
    page.get_by_role("checkbox", name="wide-lr").uncheck()
    with open(runs / "pretrain-125m" / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 2750, "seconds": 900, "val_loss": 2.5}) + "\n")
    until(page, "document.querySelectorAll('figure.first circle').length == 11")
    with open(
        runs / "pretrain-125m" / "metrics.jsonl", "a"
    ) as f:  # a second row of the same step is not missed
        f.write(
            json.dumps({"step": 2750, "seconds": 901, "loss": 2.345, "tokens_per_s": 51000}) + "\n"
        )
    until(page, "document.querySelector('.tiles').textContent.includes('2.345')")


def test_a_run_that_is_begun_anew_or_deleted_is_drawn_as_it_is(context, tmp_path):
    for i in range(14):
        write_run(tmp_path / f"run-{i}", 900, 3)
    with serve(StubEngine(), runs=tmp_path) as server:
        page = context.new_page()
        visit(page, server.url + "/#training")
        page.wait_for_selector("figure.first polyline")
        name = page.locator(".runs input:checked").get_attribute("data-keep")
        assert page.locator(".runs input").count() == 14
        page.locator("figure svg").nth(1).focus()
        write_run(tmp_path / name, 300, 3)
        until(page, "document.querySelector('.tiles').textContent.includes('Step290')")
        assert page.evaluate("document.activeElement.dataset.keep").startswith("chart of ")
        shutil.rmtree(tmp_path / name)
        until(page, "!document.querySelector('.runs input:checked')")
        assert page.locator("[role=alert]").count() == 0


# ------------------------------------------------------------------ keyboard, phone, screen readers
def test_enter_sends_and_shift_enter_makes_a_line(page, engine):
    page.focus("#prompt")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "one\ntwo"
    page.keyboard.press("Enter")
    idle(page)
    assert "user\none\ntwo<|im_end|>" in engine.tok.decode(engine.seen[-1][0])


def test_the_focus_is_visible_and_everything_is_reached_with_tab(page):
    ask(page, "story")
    here = page.url
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.url == here
    page.locator("#new").focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
            )
        )
        outline = page.evaluate("""() => {
            const e = document.activeElement;
            return e.matches("body, textarea") || getComputedStyle(e).outlineStyle;
        }""")
        assert outline != "none"
    assert {
        "new",
        "theme",
        "export",
        "model",
        "tokens",
        "gear",
        "prompt",
        "send",
        "Regenerate",
        "Copy",
        "Edit",
    } <= reached


def test_a_screen_reader_hears_the_answer_once_it_is_whole(page):
    ask(page, "story")
    status = page.locator("#status")
    assert status.get_attribute("aria-live") == "polite"
    assert STORY in status.inner_text()


def test_scrolling_up_is_left_alone_while_an_answer_grows(page):
    ask(page, "long")
    assert page.evaluate(BELOW) < 45
    ask(page, "forever", wait=False)
    until(page, "document.querySelector('#speed').textContent.match(/\\d\\d tokens/)")
    page.evaluate("document.querySelector('#scroll').scrollTop = 100")
    page.wait_for_timeout(400)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == 100 and page.is_visible(
        "#latest"
    )
    page.click("#stop")
    idle(page)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == 100
    page.click("#latest")
    assert page.evaluate(BELOW) < 45


def test_on_a_phone_nothing_is_wider_than_the_screen(page):
    page.set_viewport_size({"width": 375, "height": 740})
    ask(page, "attention")
    for view in ("compare", "training", "chat"):
        page.click(f"[data-view={view}]")
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate("""() => {
            const inside = e => e.getBoundingClientRect().right < 376;
            return [...document.querySelectorAll("header *, form *")].every(inside);
        }""")
    shot(page, "phone")
    page.click("#menu")
    page.wait_for_timeout(250)
    assert page.locator("#new").is_visible()
    page.locator("#chats .open").click()
    assert not page.locator("#side.open").count()


def test_a_model_without_chat_format_continues_text(context, runs):
    engine = StubEngine(chat=False)
    with serve(engine) as server:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("text=What shall it continue?")
        ask(page, "Once upon a time")
        assert engine.tok.decode(engine.seen[-1][0]).endswith("Once upon a time")
        assert "and so it went on" in answer(page).inner_text()
        ask(page, "")
        assert engine.tok.decode(engine.seen[-1][0]).endswith("Once upon a time and so it went on")


@pytest.mark.parametrize("theme", ["light", "sepia", "dark", "midnight"])
def test_axe_finds_no_serious_fault(page, theme):
    axe = Path(os.environ.get("AXE", ROOT / "package" / "axe.min.js"))
    if not axe.is_file():
        pytest.fail("no axe-core: see the top of this file, or give its path in $AXE")
    page.select_option("#theme", theme)

    def check(where):
        script = """;
            const node = n => n.html.slice(0, 90) + n.failureSummary.slice(0, 200);
            const fault = v => [v.impact, v.id, v.nodes.slice(0, 3).map(node)];
            axe.run().then(r => r.violations.map(fault))"""
        found = page.evaluate(axe.read_text() + script)
        assert not [v for v in found if v[0] in ("serious", "critical")], (where, found)

    check("empty")
    ask(page, "markdown")
    ask(page, "attention")
    page.click("#gear")
    check("chat and settings")
    page.click("#gear")
    page.click("#tokens")
    ask(page, "story")
    answer(page).locator(".tok").nth(5).click()
    check("tokens")
    page.keyboard.press("Escape")
    page.click("[data-view=compare]")
    page.fill("#question", "snow")
    page.press("#question", "Enter")
    page.wait_for_timeout(300)
    check("compare")
    page.click("[data-view=training]")
    page.wait_for_selector("figure.first svg polyline")
    check("training")


# ------------------------------------------------------------------------------------- a real model
def greedy_page(context, address):
    """The page of a real model, whose answers are short and always the same."""
    page = context.new_page()
    visit(page, address)
    page.click("#gear")
    page.fill("#s-temperature", "0")
    page.fill("#s-max_tokens", "60")
    page.click("#gear")
    return page


@pytest.mark.skipif(
    "MODEL" not in os.environ,
    reason="MODEL=FOLDER talks to a real chat model, ADAPTER=FOLDER also to its adapter",
)
def test_a_real_model_talks_and_its_tokens_can_be_chosen(context):
    from generate import Engine

    adapters = {"poet": os.environ["ADAPTER"]} if "ADAPTER" in os.environ else None
    with serve(Engine(os.environ["MODEL"], "cpu", adapters=adapters)) as server:
        page = greedy_page(context, server.url)
        ask(page, "Reverse this list: fox, plum, iron")
        said = answer(page).locator(".text").inner_text()
        assert said
        assert "\ufffd" not in said
        assert page.locator("[role=alert]").count() == 0
        assert re.fullmatch(
            r"[\d.]+ tok/s · \d+ tokens · first after .+ · (finished|reached the length limit)",
            answer(page).locator(".facts").inner_text(),
        )
        page.click("#tokens")
        answer(page).get_by_label("Regenerate").click()
        idle(page)
        tokens = answer(page).locator(".tok")
        assert "".join(tokens.all_inner_texts()).startswith(said.split()[0])
        tokens.nth(2).click()
        shot(page, "real-tokens")
        page.locator("#alternatives button:not(:disabled):not(:has-text('end'))").first.click()
        idle(page)
        assert answer(page).locator(".pages").inner_text().split() == ["3", "/", "3"]
        assert page.locator("[role=alert]").count() == 0
        page.click("#tokens")
        ask(page, "And once more?")
        assert page.locator("article").count() == 4
        assert answer(page).locator(".text").inner_text()
        shot(page, "real")
        if adapters:
            page.select_option("#model", "poet")
            ask(page, "Count the letters in plum")
            assert answer(page).locator(".who").inner_text() == "poet"
            assert page.locator("[role=alert]").count() == 0


# -------------------------------------------------------------------------------------- screenshots
@pytest.mark.skipif(
    not (SHOTS and "ADAPTER" in os.environ),
    reason="SHOTS=docs MODEL=runs/demo-sft ADAPTER=runs/demo-lora",
)
def test_screenshots(context):
    from generate import Engine

    model = Path(os.environ["MODEL"])
    server = serve(
        Engine(str(model), "cpu", adapters={"lora": os.environ["ADAPTER"]}),
        runs=model.parent,
        name=model.name,
        adapters="lora=" + os.environ["ADAPTER"],
    )
    with server as served:
        page = greedy_page(context, served.url)
        for question in (
            "Which is larger, 10 or 49?",
            "Use capital letters:\nriver peach scarf purple",
            "Add 4 and 5.",
            "Turn this list around:\npink lion copper cocoa",
        ):
            page.click("#new")
            ask(page, question)
        shot(page, "light")
        page.select_option("#theme", "dark")
        shot(page, "dark")
        page.select_option("#theme", "light")
        page.set_viewport_size({"width": 390, "height": 780})
        shot(page, "phone")
        page.set_viewport_size({"width": 1280, "height": 800})
        page.click("#new")
        page.click("#tokens")
        ask(page, "Add 18 and 25.")
        answer(page).locator(".tok").first.click()
        shot(page, "tokens")
        page.keyboard.press("Escape")
        page.click("#tokens")
        page.click("[data-view=compare]")
        page.get_by_label("Model of B").select_option("lora")
        page.fill("#question", "Which words stand at the ends of this list?\nzinc ladder cocoa")
        page.press("#question", "Enter")
        until(page, BOTH_FINISHED)
        shot(page, "compare")
        page.click("[data-view=training]")
        page.wait_for_selector("figure.first svg polyline")
        for box in page.get_by_role("checkbox").all():
            box.uncheck()
        page.get_by_role("checkbox", name=model.name.removesuffix("-sft"), exact=True).check()
        page.wait_for_timeout(500)
        shot(page, "training")
