"""Write a checkpoint as GGUF with llama.cpp's own converter: python convert.py SOURCE CHECKPOINT OUT {f32,bf16,q8_0}.

Two things of the converter are left out, because they are about text and nothing here is: the vocabulary (its check knows only
tokenizers that were published) and the list of tokens that a sampler must not draw. The tensors and the numbers of the model go
through llama.cpp's code unchanged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    source, checkpoint, out, kind = sys.argv[1:5]
    sys.path[:0] = [f"{source}/gguf-py", source]
    import gguf
    from conversion import get_model_class

    base = get_model_class(json.loads((Path(checkpoint) / "config.json").read_text())["architectures"][0])

    class WithoutText(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

        def _get_suppress_tokens(self) -> None:
            return None

    kinds = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    WithoutText(Path(checkpoint), kinds[kind], Path(out)).write()


if __name__ == "__main__":
    main()
