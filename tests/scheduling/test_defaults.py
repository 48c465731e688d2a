"""The share that a device gets if nobody says another."""

from poc_kernels.scheduling import Pacing, default_share


def test_every_device_has_a_share_that_a_pacing_takes() -> None:
    assert default_share("cpu") == 0.4
    assert default_share("cuda") == default_share("xpu") == Pacing().share == 0.1
    for device_type in ("cpu", "cuda"):
        assert Pacing(share=default_share(device_type)).share == default_share(device_type)
