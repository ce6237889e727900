"""LoRA adapters: attached to a frozen base, saved, and read back."""

from .lora import adapter_file, read_entry

__all__ = ["adapter_file", "read_entry"]
