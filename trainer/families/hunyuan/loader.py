"""Files of HunyuanVideo: its published tokenizer needs a class of its own."""

from __future__ import annotations

from typing import Any

from ...config.values import ConfigError
from ..loader import Loader


class HunyuanLoader(Loader):
    def load_tokenizers(self, path: str, revision: str | None) -> dict[str, Any]:
        """Load Llama 3's tokenizer as its tokenizer.json has it.

        The published index names LlamaTokenizerFast, under which transformers 5 builds a
        SentencePiece tokenizer of the same vocabulary: other ids, and no error.
        """
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                path, subfolder="tokenizer", revision=revision or "main", padding_side="right"
            )
        except ValueError as error:  # about converters, where files are missing
            raise FileNotFoundError("tokenizer/tokenizer.json cannot be read.") from error
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        # A ByteLevel splitter, alone or in a Sequence, writes bytes as letters: a newline as Ċ.
        if splitter is None or splitter.pre_tokenize_str("\n")[0][0] != "Ċ":
            raise ConfigError(
                f"tokenizer/tokenizer.json of {path} has {type(splitter).__name__} in place of the "
                "ByteLevel pre-tokenizer of Llama 3, so captions would get other ids than the "
                "model was trained with. Saving it with transformers 5 does that: fetch the files "
                f"again with `hf download {self.names.repository} --include 'tokenizer/*'`."
            )
        return {"tokenizer": tokenizer}
