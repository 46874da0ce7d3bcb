"""The clients people have, each used as its own documentation shows, with its own defaults.

    .venv-clients/bin/python tests/clients.py CLIENT URL MODEL_FOLDER     # exits 0 if all is well

tests/test_peers_serve.py runs it, in an environment of its own because of what these clients pin.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

HI = [{"role": "user", "content": "hi"}]


def openai_async(url, folder):
    import openai

    async def talk():
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k")
        model = (await client.models.list()).data[0].id
        assert (await client.models.retrieve(model)).id == model
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=model, messages=HI, seed=1) for _ in range(8))
        )
        texts = {answer.choices[0].message.content for answer in answers}
        assert len(texts) == 1
        said = ""
        stream = await client.chat.completions.create(model=model, messages=HI, seed=1, stream=True)
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
        assert {said} == texts
        short = {"model": model, "max_tokens": 9}
        answer = await client.chat.completions.create(messages=HI, **short)
        history = [*HI, answer.choices[0].message, *HI]
        assert (await client.chat.completions.create(messages=history, **short)).usage

    asyncio.run(talk())


def langchain(url, folder):
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        ok: bool

    where = {"base_url": url + "/v1", "api_key": "k"}
    model = ChatOpenAI(model=Path(folder).name, stream_usage=True, **where)
    whole = model.invoke([("system", "Be brief."), ("human", "hi")])
    assert whole.usage_metadata["input_tokens"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    short = model.bind(max_tokens=9)
    assert short.invoke([("human", "hi"), short.invoke("hi"), ("human", "and?")]).usage_metadata
    parts = list(model.stream("hi"))
    assert any(part.response_metadata.get("finish_reason") for part in parts)
    assert any(part.usage_metadata for part in parts)
    scored = model.bind(logprobs=True, top_logprobs=2, extra_body={"min_tokens": 2}).invoke("hi")
    logprobs = scored.response_metadata["logprobs"]["content"]
    assert {len(token["top_logprobs"]) for token in logprobs} == {2}
    assert isinstance(model.with_structured_output(Point).invoke("hi"), Point)
    assert len(model.batch(["a", "b"])) == 2
    assert isinstance(OpenAI(model=Path(folder).name, **where).invoke("the"), str)
    embeddings = OpenAIEmbeddings(
        model=Path(folder).name, check_embedding_ctx_length=False, **where
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2


def langchain_tools(url, folder):
    """The server's model answers with a call of add(x=41), whatever it is asked."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def add(x: int) -> int:
        """Add one."""
        return x + 1

    model = ChatOpenAI(model="stub", base_url=url + "/v1", api_key="k").bind_tools([add])
    asked = HumanMessage("add")
    call = model.invoke([asked])
    assert call.tool_calls[0]["args"] == {"x": 41}
    result = ToolMessage(str(add.invoke(call.tool_calls[0]["args"])), tool_call_id="c")
    assert model.invoke([asked, call, result]).tool_calls
    streamed = None
    for part in model.stream([asked]):
        streamed = part if streamed is None else streamed + part
    assert streamed.tool_calls[0]["args"] == {"x": 41}


def litellm(url, folder):
    import litellm

    where = {"model": "openai/" + Path(folder).name, "api_base": url + "/v1", "api_key": "k"}
    assert litellm.completion(messages=HI, **where).usage.prompt_tokens > 0
    whole = litellm.completion(messages=HI, max_tokens=9, **where)
    for said in (whole.choices[0].message, whole.choices[0].message.model_dump()):
        assert litellm.completion(messages=[*HI, said, *HI], **where).usage
    parts = litellm.completion(messages=HI, stream=True, max_tokens=5, **where)
    assert [part.choices[0].finish_reason for part in parts][-1] in ("stop", "length")
    where["model"] = "text-completion-" + where["model"]
    assert litellm.text_completion(prompt="the", max_tokens=4, **where).usage.prompt_tokens
    where["model"] = "openai/" + Path(folder).name
    assert len(litellm.embedding(input=["a", "b"], **where).data) == 2
    try:
        litellm.completion(messages=HI, **{**where, "model": "openai/none"})
    except litellm.NotFoundError:
        return
    raise AssertionError("a model that is not there was found")


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["quick", "brown"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def evaluate(tasks, model, folder, **options):
    """The harness over a few lines of our own -> {task: its results}."""
    import lm_eval.tasks

    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data.json")
        rows = [{"question": f"the {word}", "answer": "quick"} for word in ("fox", "quick", "a")]
        data.write_text("\n".join(map(json.dumps, rows)))
        described = []
        for name in tasks:
            files = {"data_files": {"test": str(data)}, "cache_dir": place}
            common = {"task": name, "dataset_path": "json", "dataset_kwargs": files}
            split = {"test_split": "test", "doc_to_text": "{{question}}"}
            described.append(common | split | TASKS[name])
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        return lm_eval.simple_evaluate(
            model, tasks=described, task_manager=manager, bootstrap_iters=0, **options
        )["results"]


def lm_eval_completions(url, folder):
    where = f"model={Path(folder).name},tokenizer={folder},base_url={url}/v1/completions"
    results = evaluate(TASKS, "local-completions", folder, model_args=where)
    assert 0 <= results["choices"]["acc,none"] <= 1
    assert results["rolling"]["byte_perplexity,none"] > 1
    assert results["answers"]["exact_match,none"] == 0


def lm_eval_chats(url, folder):
    where = f"model={Path(folder).name},base_url={url}/v1/chat/completions"
    results = evaluate(
        ["answers"], "local-chat-completions", folder, model_args=where, apply_chat_template=True
    )
    assert results["answers"]["exact_match,none"] == 0


def gradio(url, folder):
    import gradio
    from gradio.components import Chatbot
    from gradio_client import Client

    page = gradio.load_chat(url + "/v1", model=Path(folder).name, token="k")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False)
        asked = {"text": "hi", "files": []}
        assert isinstance(client.predict(asked, api_name="/open_api_stream"), str)
    finally:
        page.close()
    shown = Chatbot().postprocess([*HI, {"role": "assistant", "content": "hello"}])
    history = Chatbot().preprocess(shown)  # as the page has it before the second question
    assert all(isinstance(said, str) for said in page.fn(asked, history))


if __name__ == "__main__":
    name, url, folder = sys.argv[1:]
    globals()[name](url, folder)
