"""Adapters were read under this name before they had a room: use `longreel.trainer.adapter`."""

from .adapter.lora import adapter_file, read_entry

__all__ = ["adapter_file", "read_entry"]
