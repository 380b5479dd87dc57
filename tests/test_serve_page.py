"""The chat page in a browser: what a person sees and does, with a server that answers what the test says."""

import asyncio
import contextlib
import json
import threading

import pytest

pytest.importorskip("uvicorn")

from browser import browser, find_browser
from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

pytestmark = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium: apt-get install chromium")

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


class Fake:
    """A server with OpenAI's interface; `script` is what it does next."""

    def __init__(self):
        self.script, self.asked, self.left, self.ready = ["Hello", " there."], [], 0, True
        self.go = threading.Event()
        self.go.set()

    async def models(self, request: Request):
        return JSONResponse({"data": [{"id": "base", "max_model_len": 64}, {"id": "base:adapter"}]})

    async def health(self, request: Request):
        return JSONResponse({}, 200 if self.ready else 503)

    async def tokenize(self, request: Request):
        asked = await request.json()
        words = asked["prompt"] if "prompt" in asked else " ".join(m["content"] for m in asked["messages"])
        return JSONResponse({"count": len(words.split()), "max_model_len": 64})

    async def complete(self, request: Request):
        asked = await request.json()
        self.asked.append(asked)
        if isinstance(self.script, int):
            error = {"error": {"message": f"error {self.script}"}}
            return JSONResponse(error, self.script, headers={"Retry-After": "7"})
        chat = request.url.path.endswith("chat/completions")

        async def events():
            try:
                for number, piece in enumerate(self.script):
                    if number:  # what comes after the first waits until the test says so
                        while not self.go.is_set():
                            await asyncio.sleep(0.01)
                    if piece is ConnectionError:
                        return
                    if isinstance(piece, dict):
                        yield f"data: {json.dumps(piece)}\n\n"
                        return
                    part = {"delta": {"content": piece}} if chat else {"text": piece}
                    yield f"data: {json.dumps({'choices': [{**part, 'finish_reason': None}]})}\n\n"
                end = {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]}
                usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(self.script)}}
                yield f"data: {json.dumps(end)}\n\ndata: {json.dumps(usage)}\n\n"
                yield "data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    def app(self):
        from fastapi import FastAPI

        from mpt_eqx.serve.guards import guard
        from mpt_eqx.serve.pages import add_pages
        from mpt_eqx.serve.settings import Settings

        app = FastAPI(docs_url=None, redoc_url=None)
        add_pages(app)
        for path, answer in {"/v1/models": self.models, "/health": self.health}.items():
            app.get(path)(answer)
        for path, answer in {"/tokenize": self.tokenize, "/v1/completions": self.complete}.items():
            app.post(path)(answer)
        app.post("/v1/chat/completions")(self.complete)
        self.settings = Settings()

        async def guarded(scope, receive, send):  # settings may change from test to test
            await guard(app, self.settings)(scope, receive, send)

        return guarded


@contextlib.contextmanager
def serving(app):
    """Yields the address of a server in a thread of its own."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", server_header=False, log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    fake = Fake()
    with serving(fake.app()) as url, browser(tmp_path_factory.mktemp("profile")) as open_page:
        yield fake, url, open_page


@pytest.fixture
def chat(world):
    """Yields the server and a function that opens the page anew."""
    from mpt_eqx.serve.settings import Settings

    fake, url, open_page = world
    fake.__init__()
    fake.settings = Settings()
    pages = []

    def open_chat(path="/", wait="!document.querySelector('#model').disabled", **options):
        pages.append(open_page(url + path, **options))
        pages[-1].wait(wait)
        return pages[-1]

    yield fake, open_chat
    fake.go.set()
    for page in pages:
        assert page.events("Runtime.exceptionThrown") == []
        requests = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
        assert requests and all(one.startswith((url, "data:")) for one in requests), "a request left the origin"
        said = [event["entry"]["text"] for event in page.events("Log.entryAdded")]
        assert not any("Content Security Policy" in one for one in said), said
        page.close()


IDLE = "!document.querySelector('[aria-busy]') && document.querySelector('article') !== null"


def send(page, text, wait=IDLE):
    page.click("#draft")
    page.type(text)
    page.press("Enter")
    page.wait(wait)


def test_an_answer_streams_and_says_how_fast_it_was(chat):
    fake, open_chat = chat
    page = open_chat()
    fake.go.clear()
    send(page, "Hi", "document.querySelector('.answer')?.textContent === 'Hello'")
    assert page.eval("document.querySelector('article').getAttribute('aria-busy')") == "true"
    assert page.text("#go") == ["Stop"]
    fake.go.set()
    page.wait(IDLE)
    assert page.text(".prompt") == ["Hi"] and page.text(".answer") == ["Hello there."]
    (figures,) = page.text(".below span")
    assert "2 tokens" in figures and "tokens/s" in figures and "cut at the limit" in figures
    assert page.text("#status") == ["Answer: Hello there."] and page.text("#go") == ["Send"]
    (asked,) = fake.asked
    assert asked == {
        "model": "base", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hi"}],
    }  # fmt: skip


def test_the_conversation_and_the_settings_go_along(chat):
    fake, open_chat = chat
    page = open_chat()
    for selector, text in {
        "#system": "Be short.", "[name=temperature]": "0.5", "[name=top_p]": "0.9", "[name=top_k]": "40",
        "[name=max_tokens]": "12", "[name=seed]": "3", "[name=stop]": "\\n\\n",
    }.items():  # fmt: skip
        page.click(selector)
        page.type(text)
    send(page, "one")
    send(page, "two")
    assert fake.asked[1] == {
        "model": "base", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 12,
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 3, "stop": ["\n\n"],
        "messages": [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Hello there."}, {"role": "user", "content": "two"},
        ],
    }  # fmt: skip
    page.click("#draft")
    page.type("three")
    page.wait("document.querySelector('#count').textContent === '9 tokens of 64'")
    page.click("#new")
    assert page.text("article") == []
    page.eval("document.querySelector('[name=temperature]').value = '9'")
    page.press("Enter")
    assert page.eval("document.activeElement.name") == "temperature" and len(fake.asked) == 2


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_ends_the_answer_on_the_server_too(chat, how):
    fake, open_chat = chat
    page = open_chat()
    fake.go.clear()
    send(page, "Hi", "document.querySelector('.answer')?.textContent === 'Hello'")
    page.press("Escape") if how == "Escape" else page.click("#go")
    page.wait(IDLE)
    assert page.text(".answer") == ["Hello"] and page.text(".below span") == ["stopped"]
    assert page.eval("document.querySelector('.error').hidden")
    page.wait("true")
    for _ in range(200):
        if fake.left:
            break
        threading.Event().wait(0.01)
    assert fake.left == 1


def test_regenerate_edit_and_copy(chat):
    fake, open_chat = chat
    page = open_chat()
    send(page, "one")
    send(page, "two")
    fake.script = ["Another"]
    assert page.eval("[...document.querySelectorAll('.last')].filter(b => b.offsetWidth).map(b => b.textContent)") == [
        "Regenerate", "Edit",
    ]  # fmt: skip
    page.click("article:last-child .last")
    page.wait(f"{IDLE} && document.querySelector('article:last-child .answer').textContent === 'Another'")
    assert fake.asked[2]["messages"] == fake.asked[1]["messages"]
    page.click("article:last-child .below button:nth-of-type(4)")
    assert page.text(".prompt") == ["one"] and page.eval("document.activeElement.id + draft.value") == "drafttwo"
    page.click(".below button")
    page.wait("/Copied|Selected/.test(document.querySelector('.below button').textContent)")


def test_instruct_mode_goes_on_with_a_text_alone(chat):
    fake, open_chat = chat
    page = open_chat()
    send(page, "Hi")
    page.click("[value=text]")
    assert page.text("article") == [] and page.eval("document.querySelector('#system-field').offsetWidth") == 0
    send(page, "Once")
    page.click(".below button:nth-of-type(3)")  # continue
    page.wait(f"{IDLE} && document.querySelector('.answer').textContent === 'Hello there.Hello there.'")
    assert [(asked["prompt"], asked["max_tokens"]) for asked in fake.asked[1:]] == [
        ("Once", 63),
        ("OnceHello there.", 62),
    ]
    page.click("[value=chat]")
    assert page.text(".prompt") == ["Hi"]


def test_what_looks_like_markup_stays_text(chat):
    fake, open_chat = chat
    page = open_chat()
    fake.script = [HOSTILE[:9], HOSTILE[9:]]
    for mode in ("chat", "text"):
        page.click(f"[value={mode}]")
        send(page, HOSTILE)
        assert page.text(".prompt") == page.text(".answer") == [HOSTILE]
    assert page.eval("[window.hacked, document.querySelectorAll('img, #log script').length]") == [None, 0]
    fake.script = [{"error": {"message": HOSTILE}}]
    send(page, "again")
    assert page.text("article:last-child .error") == [HOSTILE] and page.eval("window.hacked") is None


def test_a_browser_runs_nothing_but_the_page_itself(chat):
    _, open_chat = chat
    page = open_chat()
    tried = (
        """(() => { try { document.body.innerHTML += '<b>x</b>'; return 'set'; } catch (e) { return e.name; } })()"""
    )
    assert page.eval(tried) == "TypeError"
    page.eval("document.head.append(Object.assign(document.createElement('b'), { textContent: 'x' }))")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (429, "The server is busy. Try again in 7 seconds."),
        (401, "The server wants an API key; see Settings."),
        (503, "error 503 (503)"),
        (["Half", {"error": {"message": "the engine stopped"}}], "the engine stopped"),
        (["Half", ConnectionError], "The connection was lost before the answer was complete."),
    ],
)
def test_errors_are_said_plainly(chat, script, said):
    fake, open_chat = chat
    page = open_chat()
    fake.script = script
    send(page, "Hi")
    assert page.text(".error") == [said] and page.text("#go") == ["Send"]
    assert page.text(".answer") == (["Half"] if isinstance(script, list) else [""])
    fake.script = ["Better"]
    send(page, "Hi again")
    said_before = [] if isinstance(script, int) else ["Hi", "Half"]
    assert [message["content"] for message in fake.asked[-1]["messages"]] == [*said_before, "Hi again"]


def test_the_key_is_asked_for_and_kept_in_the_tab(chat):
    from mpt_eqx.serve.settings import Settings

    fake, open_chat = chat
    fake.settings = Settings(api_keys=("sk-1",))
    page = open_chat(wait="document.activeElement.id === 'key'", width=500)
    assert page.text("#notice") == ["The server wants an API key; see Settings."]
    page.type("sk-1")
    page.press("Tab")
    page.wait("!document.querySelector('#model').disabled && document.querySelector('#notice').hidden")
    assert page.eval("Object.values(sessionStorage)") == ["sk-1"]
    assert page.eval("JSON.stringify(localStorage).includes('sk-1')") is False


def test_a_server_that_warms_up_is_waited_for(chat):
    fake, open_chat = chat
    fake.ready = False
    page = open_chat(wait="document.querySelector('#notice').textContent.includes('not ready')")
    fake.ready = True
    page.wait("document.querySelector('#notice').hidden")


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(chat, width):
    fake, open_chat = chat
    page = open_chat(width=width, height=640, mobile=width < 500)
    fake.script = ["w" * 400 + " " + "word " * 50]
    send(page, "m" * 200)
    for _ in range(2):
        assert page.eval("document.documentElement.scrollWidth") == width
        assert page.eval(
            "[...document.querySelectorAll('article *, header *, .box *')].every(e => e.getBoundingClientRect().right "
            "<= innerWidth + 0.5)"
        )
        page.click("#settings")
    assert page.eval("document.querySelector('#go').getBoundingClientRect().bottom <= innerHeight")


def test_everything_can_be_reached_and_done_with_the_keyboard(chat):
    _fake, open_chat = chat
    page = open_chat(width=500)
    assert page.eval("document.activeElement.id") == "draft"
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    page.wait(IDLE)
    assert page.text(".prompt") == ["one\ntwo"]
    reached = []
    for _ in range(14):
        page.press("Tab")
        reached.append(page.eval("document.activeElement.id || document.activeElement.textContent"))
    assert {"model", "new", "theme", "settings", "Regenerate", "Edit", "Copy", "draft"} <= set(reached)
    page.eval("document.querySelector('#settings').focus()")
    page.press("Enter")
    assert page.eval("document.querySelector('#side').hidden") is False
    page.press("Escape")
    assert page.eval("[document.querySelector('#side').hidden, document.activeElement.id]") == [True, "settings"]
    unnamed = (
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => "
        "!(e.labels?.[0]?.textContent || e.textContent || e.ariaLabel).trim()).map(e => e.outerHTML)"
    )
    assert page.eval(unnamed) == []


CONTRAST = """(() => {
  const linear = (c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = (css) => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return color.endsWith(', 0)') ? behind(e.parentElement) : color;
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  return [...document.querySelectorAll('h1, h2, button, span, label, .prompt, .answer, .error, kbd, a')]
    .filter((e) => e.offsetWidth && !e.disabled && ratio(e) < 4.5).map((e) => [ratio(e), e.outerHTML.slice(0, 90)]);
})()"""  # of WCAG 2.2


def test_light_and_dark_follow_the_system_until_one_is_chosen(chat):
    fake, open_chat = chat
    page = open_chat(dark=True)
    fake.script = ["Half", {"error": {"message": "the engine stopped"}}]
    send(page, "Hi")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.eval(background)
    assert page.eval(CONTRAST) == []
    page.prefer(dark=False)
    page.wait(f"{background} !== {dark!r}")
    assert page.eval(CONTRAST) == []
    page.click("#theme")
    assert page.eval(background) == dark and page.eval("localStorage['mpt_eqx theme']") == "dark"
    assert page.eval("document.querySelector('#theme').getAttribute('aria-pressed')") == "true"


def test_nothing_moves_for_those_who_do_not_want_it(chat):
    fake, open_chat = chat
    page = open_chat()
    fake.go.clear()
    send(page, "Hi", "document.querySelector('.answer')?.textContent === 'Hello'")
    assert page.eval("getComputedStyle(document.querySelector('.answer'), '::after').animationName") == "none"


def test_the_description_of_the_interface_is_rendered_here(chat):
    _fake, open_chat = chat
    page = open_chat("/docs", wait="document.querySelector('#about').textContent !== 'Loading …'")
    assert "/v1/chat/completions" in page.text("summary code")
    assert page.eval("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_and_the_real_application_agree(world):
    """What the page sends is taken, what comes back is shown, and Stop and a closed page free what they held."""
    from serving import ScriptedEngine, on_port, saying, shipped

    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.guards import guard
    from mpt_eqx.serve.settings import Settings

    go, (_, _, open_page) = threading.Event(), world
    models = {"base": shipped("base"), "base:chat": shipped("base:chat", chat_template="chatml")}
    words = models["base"].tokenizer.encode("the first item of each iterable")

    def script(request, ticket):
        events = saying(words, 1)(request, ticket)
        for number, event in enumerate(events):
            if number == 2:
                go.wait(20)
            yield event

    engine, settings = ScriptedEngine(script), Settings()
    with on_port(guard(create_app(engine, models, settings), settings)) as url:
        page = open_page(url)
        page.wait("document.querySelector('#model').value === 'base:chat'")
        go.set()
        for selector, text in {"[name=temperature]": "0.5", "[name=top_k]": "5", "[name=seed]": "3"}.items():
            page.click(selector)
            page.type(text)
        send(page, "What does zip() do?")
        assert page.text(".error") == [""] and page.text(".answer") == ["the first item of each iterable"]
        assert f"{len(words)} tokens" in page.text(".below span")[0]
        (asked,) = engine.requests
        assert (asked.model, asked.seed) == ("base:chat", 3)
        assert (asked.sampling.temperature, asked.sampling.top_k) == (0.5, 5)
        page.click("#draft")
        page.type("x")
        page.wait("/^[0-9]+ tokens of 256$/.test(document.querySelector('#count').textContent)")
        page.press("Enter")
        page.wait(IDLE)
        go.clear()
        page.click("[value=text]")
        send(page, "Once", "document.querySelector('.answer')?.textContent === 'the'")
        page.press("Escape")
        page.wait(IDLE)
        assert engine.tickets[-1].cancelled.wait(5) and page.text(".error") == [""]
        send(page, "Again", "document.querySelector('article:last-child .answer')?.textContent === 'the'")
        page.close()
        assert engine.tickets[-1].cancelled.wait(5)
        go.set()
        page = open_page(f"{url}/docs")
        page.wait("document.querySelectorAll('details').length >= 6")
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= set(page.text("summary code"))
        assert {"temperature", "messages", "response_format"} <= set(page.text("dt code"))
        page.close()
