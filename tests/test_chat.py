"""Chat templates: the formats, what a message cannot do, and what a template cannot do."""

import json
import resource
import shutil
import time

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

START, END, THINK = 4096, 4097, 4098
ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<think>": False, "    ": False, "covid": False, "QQQ": True}

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What does zip() do?"}
ASSISTANT = {"role": "assistant", "content": "It pairs items."}

# In the manner of the chat models' own: a default system text, no <|im_end|> after it, and newlines before turns.
QUIRKY = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}{%- set system = messages[0]['content'] -%}
{%- else -%}
    {%- set turns = messages -%}{%- set system = 'The assistant is honest.' -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate, found ' + turn['role'] + ' ' + turn['content']) }}
    {%- endif -%}
    {{ '<|im_start|>system\\n' + system.strip() + '\\n' if loop.first else '\\n' }}
    {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'].strip() + '<|im_end|>' }}
    {%- if loop.last and not add_generation_prompt and turn['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif -%}
"""


def write_tokenizer(directory, added=ADDED, **config):
    """Writes the shipped tokenizer with more tokens (text: whether it is special) and a tokenizer_config.json."""
    from mpt_eqx import SHIPPED_MODEL

    content = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for id_, (text, special) in enumerate(added.items(), 4096):
        content["added_tokens"].append({**flags, "id": id_, "content": text, "special": special})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    from mpt_eqx.text import load_tokenizer

    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def backend(directory):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def prompt(tokenizer, messages, template, **kwargs):
    return "".join(text for text, _ in tokenizer.chat_pieces(messages, chat_template=template, **kwargs))


INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    ("template", "messages", "add", "expected"),
    [
        (
            "chatml",
            [SYSTEM, USER],
            True,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does zip() do?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "chatml",
            [USER, ASSISTANT],
            False,
            "<|im_start|>user\nWhat does zip() do?<|im_end|>\n<|im_start|>assistant\nIt pairs items.<|im_end|>\n",
        ),
        ("mpt-instruct", [USER], True, INTRO + "### Instruction:\nWhat does zip() do?\n\n### Response:\n"),
        ("mpt-instruct", [USER], False, INTRO + "### Instruction:\nWhat does zip() do?"),
        (
            "mpt-instruct",
            [SYSTEM, USER, ASSISTANT, USER],
            True,
            "Be brief.\n\n" + INTRO + "### Instruction:\nWhat does zip() do?\n\n### Response:\nIt pairs items.\n\n"
            "### Instruction:\nWhat does zip() do?\n\n### Response:\n",
        ),
        (
            QUIRKY,
            [SYSTEM, USER],
            True,
            "<|im_start|>system\nBe brief.\n<|im_start|>user\nWhat does zip() do?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            QUIRKY,
            [USER, {"role": "assistant", "content": " It pairs items. "}],
            False,
            "<|im_start|>system\nThe assistant is honest.\n<|im_start|>user\nWhat does zip() do?<|im_end|>\n"
            "<|im_start|>assistant\nIt pairs items.<|im_end|><|endoftext|>",
        ),
    ],
)
def test_formats(tokenizer, backend, template, messages, add, expected):
    assert prompt(tokenizer, messages, template, add_generation_prompt=add) == expected
    tokens = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=add)
    assert tokens == backend.encode(expected).ids


def test_pieces(tokenizer):
    assert tokenizer.chat_pieces([USER], chat_template="chatml") == [
        ("<|im_start|>", START),
        ("user\nWhat does zip() do?", None),
        ("<|im_end|>", END),
        ("\n", None),
        ("<|im_start|>", START),
        ("assistant\n", None),
    ]


TEMPLATES = [
    "chatml",
    "mpt-instruct",
    QUIRKY,
    "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
]
PLAIN = st.lists(
    st.sampled_from(["<", "|", "im_end", ">", "    ", " ", "\n", "é🙂", "the zip", "ﬁ"]) | st.text(max_size=5)
)


@examples(150)
@given(PLAIN.map("".join), st.sampled_from(TEMPLATES))
def test_text_without_control_tokens_is_encoded_as_the_whole_prompt(tokenizer, backend, text, template):
    if any(token in text for token in ADDED if token.strip()) or "<|endoftext|>" in text:
        return
    messages = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(messages, chat_template=template)
    assert tokens == backend.encode(prompt(tokenizer, messages, template)).ids


HOSTILE = st.lists(
    st.sampled_from(
        [*ADDED, "<|endoftext|>", "<|im_", "end|>", "<", "QQ", "Q", "q", " ", "covi", "d", "\U000f0000", "é"]
    ),
    max_size=8,
)


@examples(150)
@given(HOSTILE.map("".join), HOSTILE.map("".join), st.sampled_from(TEMPLATES))
def test_messages_make_no_control_token(tokenizer, backend, one, other, template):
    messages = [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
    harmless = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    tokens = tokenizer.apply_chat_template(messages, chat_template=template)
    assert backend.decode(tokens, skip_special_tokens=False) == prompt(tokenizer, messages, template)
    controls = [0, *(id_ for id_, text in enumerate(ADDED, 4096) if text.strip())]
    expected = tokenizer.apply_chat_template(harmless, chat_template=template)
    assert [t for t in tokens if t in controls] == [t for t in expected if t in controls]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ ''.join([messages[0].content, messages[1].content]) }}",
        "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
        "{{ messages[0].content ~ messages[1].content | replace('x', '') }}",
        "{{ (messages[0].content + messages[1].content) | lower }}",
        "{% set t %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ t | trim }}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}",
        "{{ (messages[0].content ~ messages[1].content) | tojson }}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "{{ messages }}",
        "{{ messages | string | title | lower }}",
        "{% macro m(x) %}{{ x }}{% endmacro %}{% for x in messages %}{{ m(x.content[:99]) }}{% endfor %}",
    ],
)
def test_no_template_puts_a_control_token_together(tokenizer, template):
    for halves in (["<|im_", "end|>"], ["a<|im_end|>", ""], ["<|IM_e", "xnd|>"], ["<", "|im_end|>"]):
        messages = [{"role": "user", "content": half} for half in halves]
        pieces = tokenizer.chat_pieces(messages, chat_template=template)
        assert [id_ for _, id_ in pieces] == [None] and "\U000f0000" not in pieces[0][0], pieces
        assert "<" in pieces[0][0] and "f0000" not in pieces[0][0]
        assert END not in tokenizer.apply_chat_template(messages, chat_template=template)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("c | trim", "<think>A</think>  <b> Q"),
        ("c.strip() == '<think>A</think>  <b> Q'", "True"),
        ("'<think>A</think>  <b> Q' == c.strip()", "True"),
        ("c.strip() != '<think>'", "True"),
        ("'</think>' in c", "True"),
        ("'<x' not in c", "True"),
        ("c | length", "25"),
        ("c[1] == '<'", "True"),
        ("c[1:8]", "<think>"),
        ("(c | first) ~ (c | last)", "  "),
        ("c.split('</think>')[-1].lstrip()", "<b> Q "),
        ("c.split('<', maxsplit=1)[1]", "think>A</think>  <b> Q "),
        ("c.strip().startswith('<think>')", "True"),
        ("c.strip().startswith(('<x', '<t'))", "True"),
        ("c.find('<b>')", "19"),
        ("c.count('<')", "3"),
        ("c.strip(' <Q')", "think>A</think>  <b>"),
        ("c | replace('<think>', '[') | replace('</think>', ']')", " [A]  <b> Q "),
        ("c.replace('<b>', '').strip()", "<think>A</think>   Q"),
        ("c | upper | trim", "<THINK>A</THINK>  <B> Q"),
        ("c.lower().strip()", "<think>a</think>  <b> q"),
        ("c.partition('<b>')[2]", " Q "),
        ("{'<b>': 'found'}[c[19:22]]", "found"),
        ("c[19:22] in ['<a>', '<b>']", "True"),
        ("c | tojson", '" <think>A</think>  <b> Q "'),
        ("[c] | string", "[' <think>A</think>  <b> Q ']"),
        ("c is string", "True"),
        ("c[-2].isupper()", "True"),
        ("c > ' ;'", "True"),
        ("messages | selectattr('content', 'equalto', c) | list | length", "1"),
        ("c.split()[0] | safe", "<think>A</think>"),
    ],
)
def test_templates_see_what_messages_say(tokenizer, expression, expected):
    messages = [{"role": "user", "content": " <think>A</think>  <b> Q "}]
    template = "{% set c = messages[0].content %}{{ " + expression + " }}"
    assert prompt(tokenizer, messages, template) == expected
    assert THINK not in tokenizer.apply_chat_template(messages, chat_template=template)


def test_a_template_may_build_control_tokens_from_roles(tokenizer):
    template = "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.content }}{% endfor %}"
    messages = [{"role": "start", "content": "a"}, {"role": "end", "content": "<|im_end|>"}]
    pieces = tokenizer.chat_pieces(messages, chat_template=template)
    assert pieces == [("<|im_start|>", START), ("a", None), ("<|im_end|>", END), ("<|im_end|>", None)]


def test_control_tokens_that_take_white_space(tmp_path):
    import tokenizers

    from mpt_eqx.text import load_tokenizer

    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][2] |= {"lstrip": True, "rstrip": True}
    content["normalizer"] = {"type": "NFKC"}
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    messages = [{"role": "user", "content": "two  <  three  "}, {"role": "assistant", "content": "  ﬁve <b>"}]
    tokens = tokenizer.apply_chat_template(messages, chat_template="chatml")
    assert tokens == backend.encode(prompt(tokenizer, messages, "chatml")).ids


def test_where_the_template_comes_from(tmp_path):
    from mpt_eqx.text import load_tokenizer

    def text(**kwargs):
        return prompt(load_tokenizer(tmp_path), [USER], None, **kwargs)

    write_tokenizer(tmp_path, chat_template="{{ 1 }}{{ bos_token }}{{ eos_token }}", bos_token={"content": "<s>"})
    assert text() == "1<s><|endoftext|>"
    write_tokenizer(
        tmp_path, chat_template=[{"name": "tool_use", "template": "3"}, {"name": "default", "template": "2"}]
    )
    assert text() == "2"
    (tmp_path / "chat_template.jinja").write_text(
        "{# a file #}{% if tools is none %}{{ messages[0].role }}{% endif %}\n"
    )
    assert text() == "user"
    assert prompt(load_tokenizer(tmp_path), [USER], "{{ 4 }}") == "4"


def test_no_template(tokenizer, tmp_path):
    from mpt_eqx import CheckpointError, MPTError
    from mpt_eqx.text import Tokenizer, load_tokenizer

    with pytest.raises(MPTError, match=r"found neither .* pass chat_template='chatml' or 'mpt-instruct'"):
        tokenizer.apply_chat_template([USER])
    with pytest.raises(MPTError, match=r"^tokenizer: expected a chat template, found neither"):
        Tokenizer(tokenizer._backend, ()).apply_chat_template([USER])
    for wrong in ("chat-ml", "", 3):
        with pytest.raises(
            MPTError, match=r"chat_template: expected 'chatml' or 'mpt-instruct' or the text of a Jinja"
        ):
            tokenizer.apply_chat_template([USER], chat_template=wrong)
    with pytest.raises(MPTError, match=r"found 'x{59}…$"):
        tokenizer.apply_chat_template([USER], chat_template="x" * 1000)
    for value, found in (
        ([{"name": "a", "template": "x"}, 3], "a list with 'a'"),
        ([], "a list with nothing"),
        ([{"name": "default", "template": 3}], "a list with 'default'"),
        (3, "int"),
        ({}, "dict"),
    ):
        write_tokenizer(tmp_path, chat_template=value)
        with pytest.raises(CheckpointError, match=rf"chat_template: expected a text or a list .*, found {found}$"):
            load_tokenizer(tmp_path).apply_chat_template([USER])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: expected text in UTF-8"):
        load_tokenizer(tmp_path).apply_chat_template([USER])
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * 65_537)
    with pytest.raises(CheckpointError, match=r"expected a template of at most 65,536 bytes, found 65,537"):
        load_tokenizer(tmp_path).apply_chat_template([USER])
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' \n\n }")
    with pytest.raises(MPTError, match=r"chat_template.jinja, line 3: expected a chat template, found something else"):
        load_tokenizer(tmp_path).apply_chat_template([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list of at least one message, found none"),
        ("hello", "messages: expected a list of at least one message, found str"),
        (["hello"], r"messages\[0\]: expected a dict of role and content, found str"),
        ([USER, {"role": "user"}], r"messages\[1\]: expected a dict of 'role' and 'content', found 'role'"),
        ([{}], r"messages\[0\]: .* found an empty dict"),
        ([{**USER, "name": "x"}], r"messages\[0\]: .* found 'content', 'name', 'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: expected text, found NoneType"),
        (
            [{**USER, "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\]: expected a part .*, .* 'image_url'; this model reads text only",
        ),
        ([{**USER, "content": [{"type": "text", "text": 3}]}], r"messages\[0\].content\[0\]: expected a part"),
        ([{**USER, "content": [3]}], r"messages\[0\].content\[0\]: expected a part .*, found int"),
        ([{"role": ["user"], "content": ""}], r"messages\[0\].role: expected text, found list"),
        ([{"role": 3, "content": ""}], r"messages\[0\].role: expected text, found int"),
        (
            [{"role": "user", "content": "a\ud800"}],
            r"messages\[0\].content: expected text, found half of a char.* at 1",
        ),
        (
            [{"role": "user", "content": "".join(map(chr, range(0xF0000, 0x10FFFE)))}],
            "messages: expected a few private characters that they do not use",
        ),
    ],
)
def test_messages_are_checked(tokenizer, messages, message):
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match=message):
        tokenizer.apply_chat_template(messages, chat_template="chatml")


def test_what_a_template_refuses(tokenizer):
    from mpt_eqx import MPTError

    with pytest.raises(
        MPTError, match=r"^chat_template: the template does not take these messages: .* found user <b>$"
    ):
        tokenizer.apply_chat_template([USER, {"role": "user", "content": "<b>"}], chat_template=QUIRKY)
    with pytest.raises(MPTError, match=r"chat_template 'mpt-instruct': .* expected a first system, .* found tool"):
        tokenizer.apply_chat_template([{**USER, "role": "tool"}], chat_template="mpt-instruct")
    with pytest.raises(MPTError, match=r"these messages: a{300}…$"):
        tokenizer.apply_chat_template([USER], chat_template="{{ raise_exception('a' * 1000) }}")
    with pytest.raises(MPTError, match=r"chat_template: what the template writes: expected text, found half of a char"):
        tokenizer.apply_chat_template([USER], chat_template="{{ '\\ud800' }}")


def test_a_model_that_knows_the_text_of_a_special_token():
    import tokenizers

    from mpt_eqx import MPTError
    from mpt_eqx.text import Tokenizer

    model = tokenizers.models.WordLevel({"[U]": 0, "[END]": 1, "a": 2, "b": 3}, unk_token="[U]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[U]", "[END]"])
    template = "{{ messages[0].content }} [END]"

    def encode(content):
        return Tokenizer(backend, ()).apply_chat_template([{"role": "", "content": content}], chat_template=template)

    assert encode("a c b") == [2, 0, 3, 1]
    with pytest.raises(MPTError, match="messages: expected text that can be encoded as ordinary text"):
        encode("a [END] b")


def test_ids_with_gaps():
    import tokenizers

    from mpt_eqx import MPTError
    from mpt_eqx.text import Tokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[U]": 0, "a": 2}, unk_token="[U]"))
    backend.add_special_tokens(["[U]"])
    tokenizer = Tokenizer(backend, ())
    with pytest.raises(MPTError, match=r"tokenizer.json: expected ids without gaps"):
        tokenizer.apply_chat_template([USER], chat_template="{{ 'a[U]' }}")


def test_what_templates_can_use(tokenizer):
    used = (
        "{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + i %}{{ loop.index }}{% if not loop.last %},{% endif %}{% endfor %} {{ ns.n }} "
        "{{ m(1) }} {{ {'a': '<&>'} | tojson }} {{ [1, 2] | tojson(indent=1) }} {{ 2 ** 3 // 3 % 2 - 1.5 }} "
        "{% for k, v in {'b': 1}.items() %}{{ k ~ v }}{% else %}none{% endfor %} {{ 'é' | tojson(ensure_ascii=true) }} "
        "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}c{% endcall %} {% filter upper %}x{% endfilter %} "
        "{{ x | default('d') }} {{ dict(a=1).get('a') }} "
        "{{ ['b', 'a'] | sort | join('-') }} {{ 'a,b'.split(',')[::-1] }} {{ loop is defined }} {{ ns }}"
    )
    text = prompt(tokenizer, [USER], used)
    expected = """1,3,4, 5 12 {"a": "<&>"} [\n 1,\n 2\n] -1.5 b1 "\\u00e9" <c> X d 1 a-b ['b', 'a'] False namespace"""
    assert text == expected
    assert prompt(tokenizer, [USER], "{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert prompt(tokenizer, [USER], "a\n  {% if true %}\nb\n  {% endif %}\n{{ '' }}c\n") == "a\nb\nc"


LARGE = "the template makes a value of more than 1,000,000 characters"
MADE = "the template makes more than 16,000,000 characters in intermediate values"
LONG = "the template runs for more than 1 s"
UNSAFE = "the template failed .SecurityError: a template may not use"
WORK = "the template searches or strips with more than 200,000,000 comparisons in one call"
ELSE = "line 1: expected a chat template, found something else"


def is_quick(seconds):
    """Whether it is less than 15 times what some plain Python takes here and now, a fifth of a second when idle."""
    if seconds < 0.1:
        return True
    started = time.thread_time()
    sum(number * number for number in range(3_000_000))
    return seconds < 15 * (time.thread_time() - started)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**8 }}", LARGE),
        ("{{ 10**8 * ['a'] }}", LARGE),
        ("{{ 10 ** (10 ** 8) }}", LARGE),
        ("{% set x = 3 %}" + "{% set x = x * x %}" * 60, LARGE),
        ("{% set x = 'abc' %}" + "{% set x = x ~ x %}" * 60, LARGE),
        ("{% set x = 'abc' %}" + "{% set x = x + x %}" * 60, LARGE),
        ("{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}", LARGE),
        ("{% set x = (1, 2) %}" + "{% set x = (x, x) %}" * 60 + "{{ {x: 1} }}", LARGE),
        ("{% set x = {} %}" + "{% set x = {1: x, 2: x} %}" * 60 + "{{ x | tojson }}", LARGE),
        ("{{ range(100000) | join('a' * 99) }}", LARGE),
        ("{{ ('a' * 99999).join(['b'] * 99) }}", LARGE),
        ("{{ ('a' * 99999) | replace('a', 'b' * 99) }}", LARGE),
        ("{{ ('a' * 99999).replace('a', 'b' * 99) }}", LARGE),
        ("{{ range(99999) | list }}", LARGE),
        ("{{ ('f' * 999999) | int(0, 16) // 3 }}", LARGE),
        ("{% set x %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}", LARGE),
        ("{% set x = 'a' * 999999 %}" + "".join(f"{{% set a{i} = x[1:] %}}" for i in range(999)), MADE),
        ("{% set x = 'a' * 999999 %}" + "".join(f"{{% set a{i} = x | upper %}}" for i in range(999)), MADE),
        (
            "{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}",
            "the template writes more than 1,000,000 characters",
        ),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LONG),
        ("{% set x = 'ab' * 450000 %}{% set y = 'ab' * 99999 + 'c' %}" + "{% if y in x %}{% endif %}" * 2000, LONG),
        ("{% set x = 'ab ' * 300000 %}" + "{{ x is lower }}" * 2000, LONG),
        ("{{ ('a' * 900000).rfind('ab' + 'a' * 450000) }}", WORK),
        ("{{ ('a' * 900000).rindex('ab' + 'a' * 450000) }}", WORK),
        ("{{ ('a' * 900000).rpartition('ab' + 'a' * 450000) }}", WORK),
        ("{{ ('a' * 900000).rsplit('ab' + 'a' * 450000, 1) }}", WORK),
        ("{{ ('a' * 900000).rsplit(sep='ab' + 'a' * 450000) }}", WORK),
        ("{{ ('一' * 90000).strip('二' * 99999 + '一') }}", WORK),
        ("{{ ('一' * 90000).lstrip('二' * 99999 + '一') }}", WORK),
        ("{{ ('一' * 90000).rstrip('二' * 99999 + '一') }}", WORK),
        ("{{ ('一' * 90000) | trim('二' * 99999 + '一') }}", WORK),
        ("{{ ('一' * 90000) | trim(chars='二' * 99999 + '一') }}", WORK),
        ("{{ (['一' * 90000] | map('trim', '二' * 99999 + '一') | list) }}", WORK),
        (
            "{% set x = [1] * 9000 %}{% set n = namespace(x=x) %}{% for i in range(300) %}{% set n.x = [n.x] %}"
            "{% endfor %}{{ n.x | tojson(indent=16) }}",
            LARGE,
        ),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}", LONG),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the template failed .RecursionError"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "the template failed .RecursionError"),
        ("{{ range(10**9) }}", "the template failed .OverflowError: Range too big"),
        ("{{ '%1000000000d' % 1 }}", "the template failed .SecurityError: text is not formatted with %"),
        ("{{ '{:1000000000d}'.format(1) }}", UNSAFE + " .format of str"),
        ("{{ 'a'.center(10**9) }}", UNSAFE + " .center of str"),
        ("{{ (1).to_bytes(10**9) }}", UNSAFE + " .to_bytes of int"),
        ("{{ ''.__class__ }}", UNSAFE + " .__class__ of str"),
        ("{{ raise_exception.__globals__ }}", UNSAFE + " .__globals__ of function"),
        ("{{ messages.append(1) }}", UNSAFE + " .append of list"),
        ("{{ '%1000000000d' | format(1) }}", ELSE + " .No filter named 'format'"),
        ("{{ 'a' | center(10**9) }}", ELSE),
        ("{{ 'a' | indent(10**9) }}", ELSE),
        ("{{ [1] | batch(10**9, 0) | list }}", ELSE),
        ("{{ [1] | tojson(indent=10**9) }}", "tojson: expected an indent of at most 16 and short separators"),
        ("{{ strftime_now('%c' * 99) }}", "strftime_now: expected a format of at most 100 characters"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", ELSE + " .recursive loops are not supported"),
        ("{% include 'x' %}", ELSE + " .include has no place in a chat template"),
        ("{% autoescape true %}{% endautoescape %}", ELSE + " .autoescape has no place"),
        ("{{ a.b.c }}", "the template failed .UndefinedError: 'a' is undefined"),
        ("{{ 1 // 0 }}", "the template failed .ZeroDivisionError"),
        ("{{ '" + "é" * 40_000 + "' }}", "expected a template of at most 65,536 bytes, found 80,008"),
    ],
    ids=lambda value: value[:40],
)
def test_a_template_cannot_take_time_or_memory(tokenizer, template, message):
    from mpt_eqx import MPTError

    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(MPTError, match="^chat_template[:,].*" + message):
        tokenizer.apply_chat_template([USER], chat_template=template)
    assert is_quick(time.thread_time() - started)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000


@pytest.mark.parametrize(
    "expression",
    [
        "parts.count(c)",
        "c in parts",
        "(parts[:3000] + [c]) | max | length",
        "(parts[:3000] + [c]) | sort | length",
        "parts | select('eq', c) | list | length",
        "parts == [c] * 3",
        "(parts + [parts[0]]) | unique | list | length",
        "c.rfind('x') ~ c.strip('<x>') | length",
    ],
)
def test_no_template_takes_long_over_a_long_message(tokenizer, expression):
    """What compares a message with each item of a list does not look at all of it each time."""
    content = ";".join(f"<|{number * 7919 % 5000:050d}" for number in range(5000))
    template = "{% set c = messages[0].content %}{% set parts = c.split(';') %}{{ " + expression + " }}"
    started = time.thread_time()
    assert prompt(tokenizer, [{"role": "user", "content": content}], template)
    assert is_quick(time.thread_time() - started)


def test_comparisons_are_those_of_the_original_texts():
    from mpt_eqx.text.untrusted_text import Escapes, UntrustedText

    texts = ["", "<", "<|", "|", "a", "a<", "a<b", "a|b", "é", "é<", "ab", ";", "=", "<a"]
    escapes = Escapes.of({"<": "\U000f0000", "|": "\U000f0001"})
    for one in texts:
        for other in texts:
            for right in (other, UntrustedText(other, escapes)):
                left = UntrustedText(one, escapes)
                assert (left < right, left <= right, left > right, left >= right, left == right, left != right) == (
                    one < other, one <= other, one > other, one >= other, one == other, one != other
                )  # fmt: skip
    assert UntrustedText("1", escapes) != 1 and [UntrustedText("<", escapes)].count("<") == 1
    with pytest.raises(TypeError, match="not supported between"):
        UntrustedText("1", escapes) < 1  # noqa: B015


def test_a_content_may_be_a_list_of_texts(tokenizer):
    """As in OpenAI's messages."""
    parts = [{"type": "text", "text": "What does "}, "zip()", {"type": "text", "text": " do?"}]
    whole = tokenizer.apply_chat_template([SYSTEM, USER], chat_template="chatml")
    assert tokenizer.apply_chat_template([SYSTEM, {**USER, "content": parts}], chat_template="chatml") == whole
    assert prompt(tokenizer, [{**USER, "content": []}], "{{ messages[0].content }}.") == "."
    hostile = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    assert END not in tokenizer.apply_chat_template([{**USER, "content": hostile}], chat_template="{{ messages }}")


def test_a_namespace_does_not_write_what_it_holds(tokenizer):
    template = "".join(f"{{% set n{i} = namespace() %}}" for i in range(60))
    template += "".join(f"{{% set n{i}.a = n{i - 1} %}}{{% set n{i}.b = n{i - 1} %}}" for i in range(1, 60))
    assert prompt(tokenizer, [USER], template + "{{ n59 }}") == "namespace"


def test_a_long_conversation_is_no_bomb(tokenizer):
    messages = [{**USER, "content": "word " * 1000}, {**ASSISTANT, "content": "<b>" * 1000}] * 40
    for template in ("chatml", "mpt-instruct", QUIRKY):
        assert len(prompt(tokenizer, messages, template)) > 320_000


def test_without_the_extra(monkeypatch, tokenizer):
    import sys

    import mpt_eqx.text
    from mpt_eqx import MPTError

    monkeypatch.delitem(sys.modules, "mpt_eqx.text.template_sandbox", raising=False)
    monkeypatch.delattr(mpt_eqx.text, "template_sandbox", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MPTError, match=r"jinja2 library is needed .* pip install 'mpt_eqx\[text\]'"):
        tokenizer.apply_chat_template([USER], chat_template="chatml")


def test_the_shipped_models_template_joins_what_is_said():
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    tokenizer = load_tokenizer(SHIPPED_MODEL)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.apply_chat_template(said) == tokenizer.encode("a\n\nb\n\nc")


def test_a_tokenizer_without_a_template(tmp_path):
    from mpt_eqx import SHIPPED_MODEL, MPTError
    from mpt_eqx.text import load_tokenizer

    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path)
    with pytest.raises(MPTError, match="expected a chat template"):
        load_tokenizer(tmp_path).apply_chat_template([USER])
