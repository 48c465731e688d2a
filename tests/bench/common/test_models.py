"""The models of suites: what the option of cases takes."""

import pytest

from bench.common import models


@pytest.mark.parametrize(
    "text", ["", "gpt", "qwen3-8b", "qwen3-8b:0@2x8", "demo@1x8", "demo@2x0", "demo@2x8,,demo@2x8"]
)
def test_cases_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="cases must"):
        models.parse_cases(text)


def test_cases_are_read():
    cases = models.parse_cases("demo@16x64, qwen3-8b:2@2x8")
    assert cases == [models.Case("demo", None, 16, 64), models.Case("qwen3-8b", 2, 2, 8)]
    assert list(map(str, cases)) == ["demo@16x64", "qwen3-8b:2@2x8"]


def test_a_model_that_is_published_has_its_parameters(tmp_path):
    config = models._config("smollm2-135m", tmp_path)
    assert models._count_parameters(config) == 134_515_008
