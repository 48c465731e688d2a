"""Proofs in slices between the steps of a real vLLM: chats and proofs are those alone, in every schedule."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_in_process import Served, save_model, serving

from poc_kernels.engines.vllm import session
from poc_kernels.engines.vllm.messages import Begin, Open, Progress, Run, pack, unpack
from poc_kernels.protocol import PoCConfig

CONFIG = PoCConfig("0x00ab", 7, "key", 1.4, batch_size=4, seq_len=24, use_random_projection=True)
FORMS = ("distances", "vectors", "fingerprint")
PROMPTS = [[5 + (7 * i + 3 * j) % 500 for j in range(12 + 5 * i)] for i in range(6)]
TOKENS = 20
NONCES = 12
PLENTY = 10**6


class Rig:
    """A worker with a session, and the chats and the proofs of each form that it computes alone."""

    def __init__(self, served: Served) -> None:
        from vllm import SamplingParams

        self.served = served
        self.texts = served.texts(PROMPTS, TOKENS)
        opened = self.call("open", Open(slice_seconds=0.0005, cuda_graphs=True))
        assert opened["refusal"] is None
        self.proofs = {form: self.alone(form) for form in FORMS}
        self.sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)

    def call(self, command: str, message: Any) -> dict[str, Any]:
        return session.call(self.served.worker, command, pack(message))

    def begin(self, name: str, form: str = "distances") -> None:
        config = dataclasses.replace(CONFIG, proof=form)
        assert self.call("begin", Begin(round=name, config=dataclasses.asdict(config)))["refusal"] is None

    def run(self, name: str, jobs: dict[str, list[int]], **fields: Any) -> Progress:
        rows = {job: [("key", nonce) for nonce in nonces] for job, nonces in jobs.items()}
        return unpack(Progress, self.call("run", Run(round=name, jobs=[*jobs], rows=rows, **fields)))

    def alone(self, form: str = "distances") -> list[Any]:
        """Proofs of nonces, each computed in a forward of its own."""
        self.begin("alone", form)
        outcomes = self.run("alone", {str(nonce): [nonce] for nonce in range(NONCES)}, slices=PLENTY).outcomes
        return [outcomes[str(nonce)]["values"][0] for nonce in range(NONCES)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder: Path = tmp_path_factory.mktemp("model")
    save_model("qwen3", folder)
    with serving(folder) as served:
        yield Rig(served)


@pytest.mark.parametrize("seed", range(25))
def test_random_schedules(rig: Rig, seed: int) -> None:
    """Chats come and leave, jobs are put and cancelled, slices run in calls and between steps, at any share."""
    from vllm.inputs import TokensPrompt

    choose = random.Random(seed)
    name, form = f"round {seed}", FORMS[seed % 3]
    rig.begin(name, form)
    engine = rig.served.llm.llm_engine
    jobs: dict[str, list[int]] = {}
    coming, texts, left = [*range(len(PROMPTS))], dict[int, list[int]](), set[int]()
    computed = numbered = 0
    choose.shuffle(coming)
    while coming or engine.has_unfinished_requests() or computed < 4:
        action = choose.random()
        if coming and action < 0.1:
            chat = coming.pop()
            engine.add_request(f"{seed} {chat}", TokensPrompt(prompt_token_ids=PROMPTS[chat]), rig.sampling)
        elif action < 0.12 and len(left) < 2 and engine.has_unfinished_requests():
            chat = choose.randrange(len(PROMPTS))
            if chat not in coming and chat not in texts:
                engine.abort_request([f"{seed} {chat}"])
                left.add(chat)
        elif action < 0.3 and len(jobs) < 3:
            jobs[f"{numbered}"] = choose.sample(range(NONCES), choose.randint(1, 4))
            numbered += 1
        elif action < 0.33 and jobs:
            del jobs[choose.choice([*jobs])]
        elif action < 0.6:
            progress = rig.run(
                name,
                jobs,
                slices=choose.choice([0, 0, 1, 30]),
                alone=choose.random() < 0.1,
                share=choose.choice([0.05, 0.5, 0.9]),
            )
            for job, outcome in progress.outcomes.items():
                assert outcome["values"] == [rig.proofs[form][nonce] for nonce in jobs.pop(job)]
                computed += 1
        elif engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    texts[int(output.request_id.split()[1].split("-")[0])] = list(output.outputs[0].token_ids)
    expected = {chat: text for chat, text in enumerate(rig.texts) if chat not in left}
    assert {chat: text for chat, text in texts.items() if chat not in left} == expected
    assert len(expected) > 2


def test_slices_do_follow_steps(rig: Rig) -> None:
    """With slices before every step, the texts of chats are those without."""
    rig.begin("steps")
    jobs = {f"{number}": [number % NONCES] for number in range(400)}
    before = rig.run("steps", jobs, share=0.9).counters
    assert rig.served.texts(PROMPTS, TOKENS) == rig.texts
    progress = rig.run("steps", jobs)
    after = progress.counters
    assert after["slices_between_steps"] - before["slices_between_steps"] >= TOKENS - 2
    assert after["steps"] - before["steps"] >= TOKENS
    rig.run("steps", {}, alone=True)
    for job, outcome in progress.outcomes.items():
        assert outcome["values"] == [rig.proofs["distances"][nonce] for nonce in jobs[job]]


def test_a_session_that_is_closed_leaves_nothing(rig: Rig) -> None:
    worker = rig.served.worker
    wrapped = worker.execute_model
    session.call(worker, "close", {})
    assert worker.execute_model != wrapped
    assert rig.served.texts(PROMPTS, TOKENS) == rig.texts
    rig.call("open", Open(slice_seconds=0.0005, cuda_graphs=True))
    assert rig.alone() == rig.proofs["distances"]
