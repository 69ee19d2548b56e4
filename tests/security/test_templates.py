"""A chat template from a stranger: no code of it runs, and it is stopped within five seconds and one gigabyte."""

import pytest

from lora_sft.chat.check import check_template
from lora_sft.chat.rendering import render
from lora_sft.merging.fidelity import probes_of
from lora_sft.model.generation import reply
from tests.conftest import conversation
from tests.security.apart import apart

SECONDS, BYTES = 5.0, 2**30

SHELL = "popen('id').read()"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('__cl' ~ 'ass__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | groupby('__class__') }}",
    "{{ [''] | selectattr('__class__') | list }}",
    "{{ {'a': ''} | dictsort | map(attribute='0.__class__.__mro__') | list }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ''|attr('format')|attr('__self__') }}",
    "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "{{ (''|attr('format'))('{0.__class__}') }}",
    "{{ cycler.__init__.__globals__.os." + SHELL + " }}",
    "{{ joiner.__init__.__globals__.os." + SHELL + " }}",
    "{{ namespace.__init__.__globals__.os." + SHELL + " }}",
    "{{ lipsum.__globals__['os']." + SHELL + " }}",
    "{{ lipsum|attr('__globals__') }}",
    "{{ range.__class__ }}",
    "{{ dict.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self|attr('_TemplateReference__context') }}",
    "{{ config.__class__ }}{{ request.application }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ namespace()|attr('_Namespace__attrs') }}",
    "{% for x in (1,).__iter__() %}{{ x.gi_frame }}{% endfor %}",
    "{{ messages.append({'role': 'assistant', 'content': 'mine'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'mine'}) }}",
    "{{ messages[0].pop('content') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% from 'os' import system %}{{ system('id') }}",
    "{% extends '/etc/passwd' %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m|attr('_func') }}",
    "{% for m in messages %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{% generation %}{% endgeneration %}{{ self.environment }}",
    "{{ ().__class__.__base__.__subclasses__()[132].__init__.__globals__['popen']('id').read() }}",
    "{{ messages[0].content.trace.__class__.__init__.__globals__ }}",
    "{{ messages[0].content.origins.__class__ }}",
    "{{ 'x' | _leave }}",
    "{{ 'x' | _here }}",
    "{{ None | made }}",
]
LOOK = "{% for m in messages %}{{ m.content }}{% endfor %}"
A_MILLION = "{% set a = 'x' * 1000000 %}"
LIST = "{% set l = range(100000) | list %}"
DOUBLING = "{% set n = namespace(x=SEED) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}{{ LAST }}"
NEST = "".join("{% for i" + str(level) + " in range(99999) %}" for level in range(4)) + "{% endfor %}" * 4


def doubling(step: str, seed: str = "'ab'", last: str = "n.x") -> str:
    """A template that sixty times makes a value out of two of itself."""
    return DOUBLING.replace("SEED", seed).replace("STEP", step).replace("LAST", last)


BOMBS = {
    "nested loops": NEST,
    "a loop that is filtered": NEST.replace("99999) %}", "99999) if i0 is undefined or 0 %}"),
    "a range": "{{ range(10**9) | list }}",
    "many ranges": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a constant times": "{{ 'a' * 3000000000 }}",
    "a constant power": "{{ 9 ** (9 ** 9) }}",
    "a power": "{{ (messages | length + 8) ** 1000000000 }}",
    "a power of a power": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a shift by rounding": "{{ 5 | round(-1000000000) }}",
    "times": "{{ messages[0].content * 1000000000 }}",
    "a list times": "{{ ([0] * 1000000000) | length }}",
    "a list of lists": "{% set a = [[0] * 1000] * 1000 %}{{ [a] * 1000 }}",
    "doubled by +": doubling("n.x + n.x"),
    "doubled by ~": doubling("n.x ~ n.x"),
    "doubled by join": doubling("[n.x, n.x] | join"),
    "doubled by join, the method": doubling("''.join([n.x, n.x])"),
    "doubled by format": doubling("'%s%s' | format(n.x, n.x)"),
    "doubled by %": doubling("'%s%s' % (n.x, n.x)"),
    "doubled by str.format": doubling("'{0}{0}'.format(n.x)"),
    "doubled by replace": doubling("n.x | replace('a', 'aaa')"),
    "doubled by replace, the method": doubling("n.x.replace('a', 'aaa')"),
    "doubled lists": doubling("[n.x, n.x]", "[]"),
    "doubled lists, compared": doubling("[n.x, n.x]", "[]", "n.x == n.x[:]"),
    "doubled lists by +": doubling("n.x + n.x", "[1]"),
    "doubled tuples": doubling("(n.x, n.x)", "[]", "n.x | string | length"),
    "doubled mappings": doubling("{'a': n.x, 'b': n.x}", "{}", "n.x | tojson"),
    "doubled mappings, made by dict": doubling("dict(a=n.x, b=n.x)", "{}"),
    "doubled in a macro": "{% macro m(s, n) %}{{ m(s ~ s, n - 1) if n else s }}{% endmacro %}{{ m('ab', 60) }}",
    "doubled by defaults": "{% macro m(a0='ab'" + "".join(f", a{n + 1}=a{n}+a{n}" for n in range(40)) + ") %}{{ a40 }}"
    "{% endmacro %}{{ m() }}",
    "doubled by with": "".join("{% with s = s|default('ab') ~ s|default('ab') %}" for _ in range(60))
    + "{{ s }}" + "{% endwith %}" * 60,
    "doubled by a block": "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60 + "{{ s }}",
    "doubled by a filter block": "{% set s = 'ab' %}" + "{% set s %}{% filter upper %}{{ s }}{{ s }}{% endfilter %}"
    "{% endset %}" * 60 + "{{ s }}",
    "doubled namespaces": doubling("namespace(a=n.x, b=n.x)", "namespace()"),
    "a mutated namespace": "{% set n = namespace() %}{% set l = [n] * 100000 %}{% set n.a = 'x' * 1000000 %}{{ l }}",
    "namespaces in namespaces": "{% set n = namespace(x=namespace()) %}{% for i in range(60) %}"
    "{% set m = namespace() %}{% set m.a = n.x %}{% set m.b = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "much text": A_MILLION + "{% for i in range(99999) %}{{ a }}{% endfor %}",
    "much text in a macro": A_MILLION + "{% macro m() %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endmacro %}"
    "{{ m() | length }}",
    "many names": A_MILLION + "".join("{% set a" + str(n) + " = a[1:] ~ 1 %}" for n in range(3000)),
    "many slices": A_MILLION + "".join("{% set a" + str(n) + " = a[1:] %}" for n in range(3000)),
    "many operands": A_MILLION + "{{ " + " + ".join(["a"] * 3000) + " }}",
    "many operands of ~": A_MILLION + "{{ " + " ~ ".join(["a"] * 3000) + " }}",
    "kept in a list": A_MILLION + "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + [a ~ i] %}{% endfor %}",
    "center": "{{ 'a' | center(3000000000) }}",
    "center, mapped": "{{ messages | map(attribute='role') | map('center', 3000000000) | list }}",
    "center, the method": "{{ messages[0].content.center(3000000000) }}",
    "ljust": "{{ 'a'.ljust(3000000000) }}",
    "zfill": "{{ '1'.zfill(3000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000, true, true) }}",
    "indent with words": A_MILLION + "{{ ('a\n' * 1000) | indent(a) }}",
    "to_bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 100000}) }}",
    "a width": "{{ '%3000000000d' | format(1) }}",
    "a width by %": "{{ '%3000000000d' % 1 }}",
    "a width of a value": "{{ '%*d' % (3000000000, 1) }}",
    "a width of str.format": "{{ '{:3000000000}'.format(1) }}",
    "a nested width": "{{ '{:{w}}'.format(1, w=3000000000) }}",
    "a precision": "{{ '%.3000000000f' % 1.5 }}",
    "a date of a great width": "{{ strftime_now('%1000000000d' * 1000) }}",
    "replace of nothing": A_MILLION + "{{ a | replace('', a) }}",
    "replace in much": A_MILLION + "{{ a.replace('x', a) }}",
    "join of much": A_MILLION + LIST + "{{ l | join(a) }}",
    "join of many, the method": A_MILLION + "{{ a.join(range(99999) | map('string')) }}",
    "many of one": A_MILLION + "{{ range(99999) | map('default', a, true) | list }}",
    "batch": LIST + "{{ l | batch(3000000000, 0) | list | length }}",
    "slice": LIST + "{{ l | slice(3000000000) | list | length }}",
    "tojson": LIST + "{{ l | tojson(indent=100000) }}",
    "pprint": LIST + "{{ l | pprint }}",
    "striptags": "{{ ('<!-- -->' * 100000) | striptags }}",
    "urlize": "{{ ('http://a.b/' * 90000) | urlize }}",
    "wordwrap": A_MILLION + "{{ a | wordwrap(1, true, a) }}",
    "xmlattr": "{% set a = {'a': '<' * 1000000} %}{{ a | xmlattr }}",
    "sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "lipsum": "{{ lipsum(100000000) }}",
    "unique": LIST + "{% for i in l %}{% set x = l | unique | list | sort %}{% endfor %}",
    "the same replaced for ever": "{% set n = namespace(x='a' * 500000) %}{% for i in range(99999) %}"
    "{% set n.x = n.x.replace('a', 'b').replace('b', 'a') %}{% endfor %}",
    "a search for ever": A_MILLION + NEST.replace("{% endfor %}", "{% set q = ('y' in a) %}{% endfor %}", 1),
    "a split": A_MILLION + "{% for i in range(9999) %}{% set p = (a ~ i).split('x') %}{% endfor %}",
    "only when asked for a reply": LOOK + "{% if add_generation_prompt %}" + NEST + "{% endif %}",
    "only with a second question": LOOK + "{% if messages | length > 2 %}" + NEST + "{% endif %}",
    "a long source": "{# " + "x" * 5_000_000 + " #}" + LOOK,
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "deep loops": "{% for x in [1] %}" * 100 + "{% endfor %}" * 100,
    "deep minus": "{{ " + "-" * 100_000 + "1 }}",
    "deep not": "{{ " + "not " * 50_000 + "1 }}",
    "a number of many digits": "{{ " + "9" * 100_000 + " }}",
    "a deep list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiled_by_transformers(tokenizer):
    """Whatever is imported at the first rendering is imported before the processes part."""
    render(conversation("a", "b"), tokenizer)


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_what_lies_outside(template, tokenizer):
    talk = conversation("a", "b")
    outcome = apart(lambda: render(talk, tokenizer, chat_template=LOOK + template).text)
    assert outcome.ran == []
    assert outcome.error is None or outcome.error[0] == "TemplateError", outcome.error
    told = str(outcome.value or "")
    assert not [word for word in ("class", "function", "module", "object at", "root:", "uid=") if word in told], told
    assert talk == conversation("a", "b")


@pytest.mark.parametrize("name", BOMBS)
def test_no_template_takes_more_than_five_seconds_and_a_gigabyte(name, tokenizer):
    talk = conversation("what is it?", "it is that.", "and now?", "now it is this.")
    outcome = apart(lambda: len(render(talk, tokenizer, chat_template=BOMBS[name]).text))
    assert outcome.error is None or outcome.error[0] == "TemplateError", outcome.error
    assert outcome.seconds < SECONDS
    assert outcome.grown_bytes < BYTES
    assert outcome.value is None or outcome.value < 10**7


HELD = ["nested loops", "a constant power", "doubled by ~", "only when asked for a reply", "center, mapped"]


@pytest.mark.parametrize("name", HELD)
def test_neither_a_chat_nor_a_merge_nor_a_check_runs_into_it(name, tokenizer):
    tokenizer.chat_template = BOMBS[name]
    for work in (
        lambda: reply(None, tokenizer, conversation("hi")),
        lambda: len(probes_of(tokenizer)),
        lambda: [one.status for one in check_template(tokenizer)],
    ):
        outcome = apart(work)
        assert outcome.error is None or outcome.error[0] == "TemplateError", outcome.error
        assert outcome.seconds < SECONDS
        assert outcome.grown_bytes < BYTES
        assert not isinstance(outcome.value, list) or set(outcome.value) <= {"refused", "template refuses"}


@pytest.mark.slow
def test_a_long_conversation_is_no_bomb(tokenizer):
    """A megabyte in three hundred messages, and one message of a megabyte and a half."""
    many = conversation(*("word " * 600 + str(n) for n in range(300)))
    long = conversation("word " * 300_000 + "end", "yes")
    for name in ("chatml", "llama3"):
        for talk in (many, long):
            text = render(talk, tokenizer, chat_template=name, append_stop_token=True).text
            assert all(message["content"] in text for message in talk)
