"""What result files say of the machine."""

import json
import platform

import torch

from bench.common import conditions, report_text


def test_conditions_name_machine_versions_and_commit_and_no_host():
    found = conditions.conditions(torch.device("cpu"))
    text = report_text.header(found)
    assert f"torch {torch.__version__}" in text
    assert found["machine_info"]["gpu"] is None
    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4
