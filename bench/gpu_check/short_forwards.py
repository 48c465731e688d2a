"""``python -m bench.gpu_check.short_forwards DEVICE`` runs a small model's captured forwards, in slices.

Products run on the other stream at the same time.
"""

from __future__ import annotations

import sys

import torch


def main(name: str) -> None:
    """Run the forwards on the device of that name; without transformers say that they are skipped, as pytest does."""
    try:
        import transformers
    except ImportError as error:
        print(f"SKIPPED [1] forwards of a model: {error}")
        return
    from poc_kernels.engines.transformers.engine import TransformersEngine
    from poc_kernels.scheduling import PriorityLanes
    from poc_kernels.scheduling.slices import MEASURED_FORWARDS

    device = torch.device(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    engine = TransformersEngine(model, slice_seconds=1e-4)
    x, square = torch.randn(2, 16, 64, device=device).to(dtype), torch.randn(512, 512, device=device).to(dtype)
    signs, lanes = torch.ones(64, device=device).to(dtype), PriorityLanes(device)
    for after_layer in (None, lambda layer, hidden: hidden.mul_(signs)):
        for _ in range(MEASURED_FORWARDS + 2):
            signs.neg_()
            with lanes.inference():
                product = square @ square
            with lanes.validation():
                states = engine.forward(x, after_layer=after_layer)
        assert engine.slices is not None, "not measured"
        if device.type == "cuda":
            torch.cuda.synchronize()
            assert engine.repeated.captured is not None, "not captured"
    del product, states
    print(f"forwards in {len(engine.slices.seconds)} slices done")


if __name__ == "__main__":
    main(sys.argv[1])
