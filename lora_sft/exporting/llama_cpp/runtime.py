"""A GGUF file and questions → what llama.cpp answers: token ids, next-token distributions, greedy replies.

The runtime is the server that users run (`llama-server`, out of the package xllamacpp), asked over its own interface
on this machine only. It runs in a process of its own, since a file that it cannot read may end the process.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lora_sft
from lora_sft.errors import VerificationError

SMALL_BYTES = 64 * 2**20
"""A model below this runs on one thread: more would wait longer than they compute."""
SURE = 1e6
"""Added to the logit of a token that is to be drawn, whatever the model says."""
LOWEST = -80.0
"""A log probability in float32 that is lower is told as zero probability."""
SECONDS = 3600


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        texts: to be cut into tokens.
        probes: token ids; the distribution of the next token is asked after the last of them, and after each
            `stride`-th before it.
        prompts: token ids; each is continued greedily.
        new_tokens: the longest reply.
        conversations: messages, to be rendered with the chat template in the file.
        stop_ids: tokens that should end a reply.
        stride: the distance of the positions that are asked.
    """

    texts: Sequence[str]
    probes: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    conversations: Sequence[Sequence[dict[str, Any]]]
    stop_ids: Sequence[int]
    stride: int = 1


@dataclass(frozen=True)
class Answers:
    """What llama.cpp answered.

    Attributes:
        token_ids: of each text.
        log_probabilities: of each probe, (positions, vocabulary), float32, normalised.
        replies: of each prompt, with the token that ended it.
        stopping: those of the stop tokens after which llama.cpp does not go on.
        rendered: each conversation as text, ready for a reply; "" if its template engine refused.
        chat_ids: the token ids of these, as llama.cpp takes them for a reply.
    """

    token_ids: list[list[int]]
    log_probabilities: list[np.ndarray]
    replies: list[list[int]]
    stopping: list[int]
    rendered: list[str]
    chat_ids: list[list[int]]


def ask(model: Path, questions: Questions, adapter: Path | None = None) -> Answers:
    """Starts llama.cpp on a file and asks.

    Args:
        adapter: a LoRA as GGUF, applied with scale 1.

    Raises:
        VerificationError: llama.cpp cannot load the file, or stopped.
    """
    with tempfile.TemporaryDirectory() as scratch:
        told = {"model": str(model), "adapter": adapter and str(adapter), "questions": asdict(questions)}
        told["answers"] = scratch
        path = os.pathsep.join([str(Path(lora_sft.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(told),
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            raise VerificationError(f"{(adapter or model).name}: llama.cpp cannot run it: {_reason(done)}")
        answers = json.loads((Path(scratch) / "answers.json").read_text(encoding="utf-8"))
        with np.load(Path(scratch) / "probes.npz") as kept:
            answers["log_probabilities"] = [kept[name] for name in kept.files]
    return Answers(**answers)


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    """The first error that llama.cpp logged (`0.00.016.230 E gguf_init: failed to …`), or the last words."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    logged = [found[1] for line in lines if (found := re.match(r"[\d.]+ E (.*)", line))]
    return logged[0] if logged else lines[-1] if lines else f"exit code {done.returncode}"


def positions(length: int, stride: int) -> list[int]:
    """The last position and each `stride`-th before it, in order."""
    return list(range((length - 1) % stride, length, stride))


def main() -> None:
    """The process: file and questions on standard input, the answers into a folder."""
    told = json.load(sys.stdin)
    questions = Questions(**told["questions"])
    runtime = Runtime(told["model"], told["adapter"], questions)
    rendered = [runtime.render(conversation) for conversation in questions.conversations]
    answers = {
        "token_ids": [runtime.tokens(text) for text in questions.texts],
        "replies": [runtime.reply(prompt, questions.new_tokens) for prompt in questions.prompts],
        "stopping": [stop for stop in questions.stop_ids if runtime.stops_after(questions.probes[0], stop)],
        "rendered": rendered,
        "chat_ids": [runtime.tokens(text, with_special=True) for text in rendered],
    }
    probes = [
        runtime.distributions(probe, positions(len(probe), questions.stride), questions.stop_ids[0])
        for probe in questions.probes
    ]
    np.savez(Path(told["answers"]) / "probes.npz", *probes)
    (Path(told["answers"]) / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the server's threads need not be waited for


class Runtime:
    """llama.cpp's server, with all of its arithmetic that can be in float32."""

    def __init__(self, model: str, adapter: str | None, questions: Questions):
        llama = importlib.import_module("xllamacpp")
        longest = max([len(ids) for ids in (*questions.probes, *questions.prompts)], default=0)
        wanted = llama.CommonParams()
        wanted.model.path = model
        wanted.n_ctx = (longest + questions.new_tokens) // 256 * 256 + 512
        wanted.n_parallel, wanted.n_gpu_layers, wanted.verbosity = 1, 0, 1
        wanted.warmup = wanted.fit_params = False
        wanted.cache_type_k = wanted.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        wanted.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if Path(model).stat().st_size < SMALL_BYTES:
            wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        if adapter is not None:
            lora = llama.CommonAdapterLoraInfo()
            lora.path, lora.scale = adapter, 1.0
            wanted.lora_adapters = [lora]
        self._server = llama.Server(wanted)

    def tokens(self, text: str, with_special: bool = False) -> list[int]:
        """Ids of a text; with the bos token, if the file says that there is one."""
        told: list[int] = self._ask("/tokenize", content=text, add_special=with_special, parse_special=True)["tokens"]
        return told

    def render(self, conversation: Sequence[dict[str, Any]]) -> str:
        """A conversation as the template in the file writes it, up to where the reply begins."""
        try:
            told: str = self._ask("/apply-template", messages=list(conversation))["prompt"]
        except urllib.error.HTTPError:
            return ""
        return told

    def reply(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The likeliest tokens, one after the other."""
        told = self._ask(
            "/completion", prompt=list(prompt), n_predict=new_tokens, temperature=0, top_k=1, return_tokens=True
        )
        replied: list[int] = told["tokens"][:new_tokens]
        return replied

    def stops_after(self, prompt: Sequence[int], stop: int) -> bool:
        """Whether llama.cpp ends a reply when this token is drawn."""
        told = self._ask("/completion", prompt=list(prompt), n_predict=2, temperature=0, logit_bias=[[stop, SURE]])
        return bool(told["stop_type"] == "eos")

    def distributions(self, probe: Sequence[int], after: Sequence[int], stop: int) -> np.ndarray:
        """Log probabilities of the next token after some positions, (positions, vocabulary)."""
        return np.stack([self._distribution(probe[: end + 1], stop) for end in after])

    def _distribution(self, prompt: Sequence[int], stop: int) -> np.ndarray:
        # The distribution comes with a drawn token; a stop token is always whole text, where others may be part of a
        # letter and are held back. What is drawn does not change the distribution that is told.
        told = self._ask(
            "/completion",
            prompt=list(prompt),
            n_predict=1,
            temperature=0,
            n_probs=2**31 - 1,
            logit_bias=[[stop, SURE]],
            cache_prompt=True,
            response_fields=["completion_probabilities"],
        )
        likely = told["completion_probabilities"][0]["top_logprobs"]
        found = np.full(len(likely), -np.inf)
        found[[token["id"] for token in likely]] = [token["logprob"] for token in likely]
        normalised = found - np.log(np.exp(found).sum())  # llama.cpp sums in float32
        told_at_all: np.ndarray = np.maximum(normalised, LOWEST).astype(np.float32)
        return told_at_all

    def _ask(self, path: str, **told: Any) -> Any:
        asked = urllib.request.Request(
            self._server.listening_address + path, json.dumps(told).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
            return json.loads(answer.read())


if __name__ == "__main__":
    main()
