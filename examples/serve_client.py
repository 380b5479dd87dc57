"""Asks a running server: with the openai package, or with nothing but Python's own library.

    mpt-eqx serve                              in another terminal
    python examples/serve_client.py            a streamed answer and a scored text, with the openai package
    python examples/serve_client.py --plain    the same with urllib

The openai package is not part of any extra: pip install openai.
"""

import argparse
import json
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

URL = "http://127.0.0.1:8000"


def choose(models: list[dict[str, Any]]) -> str:
    """Returns the name of the first model with a chat template of its own, such as an adapter's, else of the first."""
    return next((model["id"] for model in models if model["chat_template"] == "given"), models[0]["id"])


def with_openai(url: str, key: str, question: str, text: str, max_tokens: int) -> None:
    """Prints an answer while it comes, and the log-probability of a text."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    model = choose([model.to_dict() for model in client.models.list()])
    messages = [{"role": "user", "content": question}]
    chunks = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    scored = client.completions.create(model=model, prompt=text, max_tokens=0, echo=True, logprobs=1)
    show_score(scored.choices[0].logprobs.token_logprobs)


def with_urllib(url: str, key: str, question: str, text: str, max_tokens: int) -> None:
    """Does the same without any package."""
    model = choose(ask(f"{url}/v1/models", key)["data"])
    messages = [{"role": "user", "content": question}]
    fields = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    for chunk in events(f"{url}/v1/chat/completions", key, fields):
        print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    fields = {"model": model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    show_score(ask(f"{url}/v1/completions", key, fields)["choices"][0]["logprobs"]["token_logprobs"])


def show_score(logprobs: list[float | None]) -> None:
    """Prints how likely a text is; its first token has nothing before it that it could follow from."""
    known = [logprob for logprob in logprobs if logprob is not None]
    print(f"\n{sum(known):.2f} nats for {len(known)} tokens")


def request(url: str, key: str, fields: dict[str, Any] | None = None) -> urllib.request.Request:
    """Returns a request with a body of JSON, or without one."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return urllib.request.Request(url, None if fields is None else json.dumps(fields).encode(), headers)


def ask(url: str, key: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the answer to one request."""
    with urllib.request.urlopen(request(url, key, fields)) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def events(url: str, key: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the chunks of a streamed answer. One that ends without [DONE] is not complete."""
    with urllib.request.urlopen(request(url, key, {**fields, "stream": True})) as response:
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                chunk = json.loads(data)
                if "error" in chunk:
                    raise SystemExit(f"the server ended the answer: {chunk['error']['message']}")
                yield chunk
    raise SystemExit("the connection ended before the answer")


def main() -> None:
    """Asks for an answer, and for the score of a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=URL, help="address of the server")
    parser.add_argument("--key", default=os.environ.get("MPT_EQX_API_KEY", "none"), help="API key, if it wants one")
    parser.add_argument("--question", default="What does zip() do?")
    parser.add_argument("--text", default="Return a list of the items.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--plain", action="store_true", help="without the openai package")
    args = parser.parse_args()
    (with_urllib if args.plain else with_openai)(
        args.url.rstrip("/"), args.key, args.question, args.text, args.max_tokens
    )


if __name__ == "__main__":
    main()
