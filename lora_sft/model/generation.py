"""Messages → what the model says next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_sft.chat.rendering import prompt_text
from lora_sft.data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reply(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
    **template_variables: Any,
) -> str:
    """The assistant's next turn.

    Args:
        model: in training or eval mode; left as it was.
        messages: the conversation so far, ending with the user or a tool.
        max_new_tokens: the reply is cut there if no stop token comes.
        temperature: 0 takes the likeliest token each time; above 0 draws.
        top_p: draws only from the likeliest tokens that together have this share.
        streamer: of transformers; receives the tokens as they come.
        template_variables: for the chat template.
    """
    import torch

    text = prompt_text(messages, tokenizer, **template_variables)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            tokens = model.generate(
                **prompt,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
                **drawing,
            )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
