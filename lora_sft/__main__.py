"""`python -m lora_sft` is `lora-sft`."""

from lora_sft.cli import main

main()
