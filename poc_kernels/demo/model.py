"""A small Qwen3-like language model with seeded random weights and a trained tokenizer: no download, same bytes."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MIN_VOCAB = 512
MAX_VOCAB = 2048
MAX_POSITIONS = 4096
"""Maximum number of tokens of a prompt and its answer together."""

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_HEAD_DIM = 32
_STD = 0.05
_SEED = 0


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly ``vocab`` tokens on prose.txt."""
    prose = importlib.resources.files(__package__).joinpath("prose.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _fill(model: Qwen3ForCausalLM, special: list[int]) -> None:
    """Draw the weights; norms become ones; special tokens get the logit zero, so that answers rarely end early."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * _STD)
        model.lm_head.weight[special] = 0.0


def build(directory: Path, *, hidden_size: int = 256, layers: int = 4, vocab: int = MAX_VOCAB) -> None:
    """Save a float32 causal language model and its tokenizer, as ``from_pretrained`` loads them.

    The same arguments and versions give the same bytes; torch's global generators are left as they were.

    Args:
        directory: where to save; created if it does not exist.
        hidden_size: a positive multiple of 64.
        layers: number of decoder layers, at least 1.
        vocab: size of the vocabulary, in [512, 2048]; every id has a token.

    Raises:
        ValueError: an argument is out of its range.
    """
    if hidden_size < 1 or hidden_size % (2 * _HEAD_DIM):
        raise ValueError(f"hidden_size must be a positive multiple of {2 * _HEAD_DIM}, got {hidden_size}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not MIN_VOCAB <= vocab <= MAX_VOCAB:
        raise ValueError(f"vocab must be in [{MIN_VOCAB}, {MAX_VOCAB}], got {vocab}")
    tokenizer = _tokenizer(vocab)
    heads = hidden_size // _HEAD_DIM
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=_HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The constructor draws weights, which `_fill` replaces: the caller's generator must not be advanced by that.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = Qwen3ForCausalLM(config)
    _fill(model, tokenizer.all_special_ids)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.float().eval().save_pretrained(directory)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)
