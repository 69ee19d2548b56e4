"""Real conversations of others, where they lie beside the project: they train, and the loss falls."""

from pathlib import Path

import pytest

from lora_sft import finetune, preview
from lora_sft.data.formats import to_conversations
from lora_sft.data.sources import read_rows
from lora_sft.model.tiny import save_tiny
from tests.conftest import logged

REAL = Path(__file__).parents[2] / "shared" / "data"
FILES = ("glaive_toolcall_en.json", "reason_tool_use.jsonl")

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real conversations are not here")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    texts = [
        message["content"]
        for name in FILES
        for row in to_conversations(read_rows(REAL / name))
        for message in row.messages
    ]
    return save_tiny(tmp_path_factory.mktemp("base"), texts, vocabulary_size=4096, initializer_range=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_trains_with_nf4_and_the_loss_falls(name, base, tmp_path):
    run = finetune(
        base,
        REAL / name,
        output_dir=tmp_path / "run",
        max_steps=20,
        max_length=1024,
        max_lost_share=1,  # most of these conversations are longer
        learning_rate=3e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        save_strategy="no",
        listeners=(),
    )
    losses = [line["loss"] for line in logged(run.output_dir)]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


@pytest.mark.parametrize("name", FILES)
def test_every_word_of_the_assistant_is_learned_and_no_word_of_another(name, base):
    """The marked text, put together, is what the data says the assistant said."""
    conversations = to_conversations(read_rows(REAL / name))
    for conversation, shown in zip(conversations, preview(base, REAL / name), strict=True):
        replies = [message for message in conversation.messages if message["role"] == "assistant"]
        assert len(shown.rendered.supervised) == len(replies)
        for (start, end), reply in zip(shown.rendered.supervised, replies, strict=True):
            learned = shown.rendered.text[start:end]
            assert learned.endswith("<|im_end|>")
            for part in (reply["content"], reply.get("reasoning_content", "")):
                assert part in learned
            assert all(f'"{call["function"]["name"]}"' in learned for call in reply.get("tool_calls", []))
            assert "<|im_start|>" not in learned
