"""A backend is used only after it gave the known answers; which one that is."""

import json
import logging
import re
import sys
import warnings
from importlib import resources

import pytest
import torch
from helpers import CPU, PASSING_ERRORS, assert_same_bits, expected, project, rows_of_every_kind
from vectors import VECTORS

import poc_kernels
from poc_kernels import backends, reference
from poc_kernels.kernels import Backend, cpu, self_test, trial

X = rows_of_every_kind(6, 40, torch.float32, 1)
SEED = poc_kernels.seed_tensor(7)
NAMES = [backend.name for backend in backends.backends()]
KNOWN = json.loads(resources.files("poc_kernels.kernels").joinpath("known_answers.json").read_text())

pytestmark = pytest.mark.usefixtures("fresh_choice")


# The vectors that the reference computes at once.
SMALL = {
    kind: [case for case in VECTORS[kind] if case["K"] <= 100] for kind in ("entries", "residual", "projection", "edge")
}


KEYS = ("sha256", "masked_sha256", "shard_sha256")


def one_wrong_bit(*arguments):
    y = reference.project(*arguments)
    integer = torch.int32 if y.dtype == torch.float32 else torch.int16
    y.view(integer)[-1, -1] ^= 1
    return y


def one_wrong_entry(*arguments):
    e = reference.entries(*arguments)
    e[-1, -1] += 2
    return e


def raising(*arguments):
    raise RuntimeError("a kernel that does not launch")


def made(name, project=reference.project, entries=reference.entries, unavailable=None, **options):
    return Backend(name, project, entries, unavailable=lambda device: unavailable, **options)


def install(monkeypatch, *candidates):
    monkeypatch.setattr(backends, "backends", lambda: candidates)


# ---- the known answers ---------------------------------------------------------------------------------------------


def test_known_answers_are_a_part_of_the_vectors():
    assert KNOWN["definition"] == VECTORS["definition"]
    for kind in ("entries", "residual", "projection", "edge"):
        assert KNOWN[kind], f"no {kind}"
        cases = [{name: value for name, value in case.items() if name != "y_hex"} for case in VECTORS[kind]]
        assert all({name: value for name, value in case.items() if name != "y_hex"} in cases for case in KNOWN[kind])
    products = KNOWN["residual"] + KNOWN["edge"]
    assert {(case["dtype"], case["bits"]) for case in products} == {
        (dtype, bits) for dtype in ("float32", "bfloat16", "float16") for bits in (16, 8)
    }


def test_every_backend_gives_every_answer(backend):
    assert self_test.wrong_answers(backend, CPU) == []
    assert self_test.wrong_answers(backend, CPU, SMALL) == []


def test_digest_reads_values_row_by_row():
    values = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    assert self_test.digest(values.t()) == self_test.digest(values.t().contiguous())
    assert self_test.digest(values.t()) != self_test.digest(values)
    assert self_test.digest(values[:0]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_one_wrong_bit_is_found_in_every_product():
    wrong = self_test.wrong_answers(made("wrong", project=one_wrong_bit), CPU, SMALL)
    assert len(wrong) == sum(len(SMALL[kind]) for kind in ("residual", "projection")) + 3 * len(SMALL["edge"])
    assert "residual sha256 of float32, K = 16, 16 bits" in wrong
    assert "residual masked_sha256 of bfloat16, K = 17, 8 bits" in wrong
    assert "residual shard_sha256 of float16, K = 40, 16 bits" in wrong
    assert "projection sha256 of bfloat16, K = 100, 8 bits" in wrong


def test_one_wrong_entry_is_found_in_every_window():
    wrong = self_test.wrong_answers(made("wrong", entries=one_wrong_entry), CPU, SMALL)
    assert len(wrong) == len(VECTORS["entries"])
    assert "entries from k = 1008, n = 4093 of domain 4294967295" in wrong


@pytest.mark.parametrize("part", ["project", "entries"])
def test_an_exception_is_a_wrong_answer(part):
    wrong = backends.verdict(made("raising", **{part: raising}), CPU)
    assert wrong == ["RuntimeError: a kernel that does not launch"]


@pytest.mark.parametrize(
    "flaw",
    [{"row_mask": None}, {"column_start": 0}, {"domain": 0}, {"activation_bits": 16}, {"residual": False}],
    ids=lambda flaw: next(iter(flaw)),
)
def test_a_backend_that_ignores_an_argument_is_found(flaw):
    def careless(x, seed, request):
        return reference.project(x, seed, request._replace(**flaw))

    assert self_test.wrong_answers(made("careless", project=careless), CPU)


def rounded_otherwise(dtype, tie):
    """A backend whose final rounding to ``dtype`` sends ties where ``tie`` (the exact result) says: up or down."""

    def project(x, seed, request):
        y = reference.project(x, seed, request)
        if x.dtype != dtype:
            return y
        projected = reference.project(x.float(), seed, request._replace(residual=False, row_mask=None)).double()
        shard = slice(request.column_start, request.column_start + request.columns)
        exact = projected + x[:, shard].double() if request.residual else projected
        nearest = y.double()
        other = 2 * exact - nearest  # the neighbour on the other side, if this is a tie
        ties = (nearest != exact) & (other.to(dtype).double() == other)
        if request.row_mask is not None:
            ties &= request.row_mask[:, None]
        upper, lower = torch.maximum(nearest, other).to(dtype), torch.minimum(nearest, other).to(dtype)
        return torch.where(ties, torch.where(tie(exact), upper, lower), y)

    return made("rounds otherwise", project=project)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tie",
    [
        lambda exact: exact > -torch.inf,
        lambda exact: exact < -torch.inf,
        lambda exact: exact > 0,
        lambda exact: exact < 0,
    ],
    ids=["up", "down", "away from zero", "towards zero"],
)
def test_ties_of_the_final_rounding_are_among_the_known_answers(dtype, tie):
    """Each dtype has its own, with and without masks and shards, at both widths of activations."""
    edges = {"entries": [], "residual": [], "projection": [], "edge": KNOWN["edge"]}
    wrong = self_test.wrong_answers(rounded_otherwise(dtype, tie), CPU, edges)
    name = str(dtype).removeprefix("torch.")
    assert {f"residual {key} of {name}, K = 17, {bits} bits" for key in KEYS for bits in (16, 8)} <= set(wrong)
    assert all(f"of {name}," in each for each in wrong)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_best_backend_that_this_machine_runs_serves():
    best = next(backend for backend in backends.backends() if backend.unavailable(CPU) is None)
    assert backends.select(CPU).name == best.name
    assert NAMES[-1] == "reference"


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (made("broken", project=one_wrong_bit), "residual sha256 of float32"),
        (made("broken", entries=one_wrong_entry), "entries from k = 0, n = 0 of domain 0"),
        (made("broken", project=raising), "RuntimeError: a kernel that does not launch"),
    ],
)
def test_a_broken_backend_is_never_used(broken, what, monkeypatch, caplog):
    install(monkeypatch, broken, made("good"))
    with caplog.at_level(logging.INFO, logger="poc_kernels"):
        assert_same_bits(poc_kernels.residual_projection(X, SEED), expected(X))
        assert_same_bits(poc_kernels.residual_projection(X, SEED), expected(X))
    assert backends.select(CPU).name == "good"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "the verdict is reached, and logged, once"
    assert "backend broken gives wrong answers on cpu and will not be used there: " in errors[0]
    assert what in errors[0]
    chosen = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert chosen == ["poc_kernels uses backend good on cpu"]


def test_no_backend_left_is_an_error(monkeypatch):
    install(monkeypatch, made("broken", project=one_wrong_bit), made("absent", unavailable="it has no such CPU"))
    message = (
        "no poc_kernels backend can be used on cpu (broken: wrong answers in its self-test; absent: it has no such CPU)"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            poc_kernels.residual_projection(X, SEED)


def test_an_unavailable_backend_is_not_tried(monkeypatch):
    install(monkeypatch, made("absent", project=raising, unavailable="no"), made("good"))
    assert backends.select(CPU).name == "good"
    assert [name for name, _ in trial.verdicts] == ["backend good"]


def test_a_backend_that_is_trusted_is_not_tried(monkeypatch):
    install(monkeypatch, made("broken", project=raising), made("good"))
    with pytest.raises(ValueError, match="name must be one of broken, good, got abacus"):
        backends.trust("abacus", CPU)
    backends.trust("broken", CPU)
    assert backends.select(CPU).name == "broken"
    assert trial.verdicts == {("backend broken", CPU): []}, "elsewhere it is tried"


def test_a_backend_is_tried_once_on_each_device(monkeypatch):
    trials = []
    monkeypatch.setattr(self_test, "wrong_answers", lambda backend, device: trials.append((backend.name, device)) or [])
    install(monkeypatch, made("good"))
    for device in (CPU, CPU, torch.device("meta"), torch.device("meta")):
        assert backends.select(device).name == "good"
    assert trials == [("good", CPU), ("good", torch.device("meta"))]


def test_the_environment_names_a_backend(backend, monkeypatch):
    monkeypatch.setenv("POC_KERNELS_BACKEND", backend.name)
    assert backends.select(CPU).name == backend.name
    assert_same_bits(poc_kernels.residual_projection(X, SEED), expected(X))


def test_an_empty_name_in_the_environment_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("POC_KERNELS_BACKEND", "")
    assert backends.select(CPU).unavailable(CPU) is None


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("POC_KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match=f"must be one of {', '.join(NAMES)}, got abacus"):
        poc_kernels.residual_projection(X, SEED)


def test_a_broken_backend_is_not_used_even_when_asked_for(monkeypatch):
    install(monkeypatch, made("broken", project=one_wrong_bit), made("good"))
    monkeypatch.setenv("POC_KERNELS_BACKEND", "broken")
    with pytest.raises(RuntimeError, match=re.escape("on cpu (broken: wrong answers in its self-test)")):
        backends.select(CPU)


def test_native_kernels_run_on_the_cpu_only():
    for backend in backends.backends():
        if not backend.name.startswith("native-"):
            continue
        assert backend.unavailable(torch.device("cuda")) == "runs on the CPU only"
    assert backends.backends()[-1].unavailable(torch.device("cuda")) is None


# ---- what known answers do not reach --------------------------------------------------------------------------------


@pytest.fixture
def asked():
    """The devices for which a backend was asked what of its tiles is wrong."""
    return []


@pytest.fixture
def tiled(asked):
    """Makes a backend that says what of its tiles is wrong, or raises it."""

    def with_tiles(found, **options):
        def wrong(device):
            asked.append(device)
            if isinstance(found, Exception):
                raise found
            return found

        return made("tiled", wrong=wrong, **options)

    return with_tiles


def test_a_tile_that_the_known_answers_do_not_reach_is_tried(tiled, asked, monkeypatch, caplog):
    backend = tiled(["16 bits in int8 by a tile, K whole"])
    install(monkeypatch, backend, made("good"))
    assert backends.select(CPU).name == "good"
    assert backends.verdict(backend, CPU) == ["16 bits in int8 by a tile, K whole"]
    assert asked == [CPU], "once"
    assert "will not be used there: 16 bits in int8 by a tile, K whole" in caplog.text


@pytest.mark.parametrize("error", PASSING_ERRORS, ids=repr)
def test_an_exception_of_a_tile_is_a_wrong_answer_except_for_a_condition_that_passes(error, tiled):
    with pytest.raises(type(error)) as raised:
        backends.verdict(tiled(error), CPU)
    assert raised.value is error
    broken = tiled(RuntimeError("a tile that does not launch"))
    assert backends.verdict(broken, CPU) == ["RuntimeError: a tile that does not launch"]


def test_tiles_are_tried_of_a_backend_that_gives_the_known_answers(tiled, asked):
    assert backends.verdict(made("good"), CPU) == []
    assert backends.verdict(tiled([], entries=raising), CPU) == ["RuntimeError: a kernel that does not launch"]
    assert asked == []
    trial.verdicts.clear()
    assert backends.verdict(tiled([]), CPU) == []
    assert asked == [CPU]


def test_the_triton_backend_has_its_tiles_tried(monkeypatch):
    asked = []
    kernels = pytest.importorskip("triton") and pytest.importorskip("poc_kernels.kernels.triton.product")
    monkeypatch.setattr(kernels, "wrong_tiles", lambda device: asked.append(device) or ["a tile"])
    monkeypatch.setattr(self_test, "wrong_answers", lambda backend, device: [])
    assert backends.verdict(next(each for each in backends.backends() if each.name == "triton"), CPU) == ["a tile"]
    assert asked == [CPU]


def test_a_backend_may_serve_a_device_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(self_test, "wrong_answers", lambda backend, device: [])
    install(monkeypatch, made("shy", by_name_only=("cpu",)), made("good"))
    assert backends.select(CPU).name == "good"
    assert backends.select(torch.device("meta")).name == "shy"
    with poc_kernels.use_backend("shy"):
        assert backends.select(CPU).name == "shy"
    assert backends.unavailable(backends.backends()[0], CPU) == "serves a cpu only where it is asked for by name"


# ---- use_backend ---------------------------------------------------------------------------------------------------


def test_use_backend_holds_inside_its_block(monkeypatch):
    before = backends.select(CPU).name
    monkeypatch.setenv("POC_KERNELS_BACKEND", before)
    with poc_kernels.use_backend("reference"):
        assert backends.select(CPU).name == "reference"
        with poc_kernels.use_backend(before):
            assert backends.select(CPU).name == before
        assert backends.select(CPU).name == "reference"
        assert_same_bits(poc_kernels.residual_projection(X, SEED), expected(X))
    assert backends.select(CPU).name == before


def test_use_backend_ends_with_an_exception():
    before = backends.select(CPU).name
    with pytest.raises(KeyError), poc_kernels.use_backend("reference"):
        raise KeyError
    assert backends.select(CPU).name == before


def test_use_backend_refuses_an_unknown_name():
    with (
        pytest.raises(ValueError, match=f"name must be one of {', '.join(NAMES)}, got abacus"),
        poc_kernels.use_backend("abacus"),
    ):
        pass


def test_use_backend_serves_the_backend_it_names(monkeypatch):
    calls = []

    def counting(x, seed, request):
        calls.append(request.columns)
        return reference.project(x, seed, request)

    install(monkeypatch, made("good"), made("counted", project=counting))
    with poc_kernels.use_backend("counted"):
        poc_kernels.residual_projection(X, SEED)
        calls.clear()
        poc_kernels.residual_projection(X, SEED)
    poc_kernels.residual_projection(X, SEED)
    assert calls == [40]


# ---- without the native core ---------------------------------------------------------------------------------------


@pytest.fixture
def no_native_core(fresh_choice, monkeypatch):
    monkeypatch.delattr(poc_kernels, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "poc_kernels._native", None)


def test_plain_torch_serves_where_there_is_no_native_core(no_native_core):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_same_bits(poc_kernels.residual_projection(X, SEED), expected(X))
        assert cpu.instruction_sets() == []
        assert [backend.name for backend in backends.backends()] == ["cuda", "triton", "reference"]
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "without its native core" in str(caught[0].message)
    assert caught[0].category is RuntimeWarning


def test_no_native_core_is_a_known_state_of_the_environment(no_native_core, monkeypatch):
    monkeypatch.setenv("POC_KERNELS_BACKEND", "native-portable")
    with (
        pytest.warns(RuntimeWarning, match="without its native core"),
        pytest.raises(ValueError, match="must be one of cuda, triton, reference, got native-portable"),
    ):
        project(backends.select(CPU), X)


@pytest.mark.parametrize("error", PASSING_ERRORS, ids=repr)
def test_a_condition_that_passes_is_not_remembered(error, monkeypatch, caplog):
    def unlucky(*arguments):
        if errors:
            raise errors.pop()
        return reference.entries(*arguments)

    errors = [error]
    install(monkeypatch, made("unlucky", entries=unlucky), made("slow"))
    with pytest.raises(type(error)) as raised:
        backends.select(CPU)
    assert raised.value is error
    assert backends.select(CPU).name == "unlucky"
    assert not caplog.records


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), ImportError("no name capture_begin"), RuntimeError("out of resource: shared memory")],
)
def test_other_errors_tell_of_the_backend(error):
    assert not trial.is_transient(error)
    assert trial.is_transient(MemoryError())


def test_torch_s_error_where_a_cpu_has_no_memory_left_tells_nothing_of_the_backend():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert trial.is_transient(raised.value)
