"""On a GPU: the backends that serve there give the definition's bits, however they are called."""

import itertools

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    LAYOUTS,
    NEAR_ROUNDINGS,
    PLAIN,
    assert_same_bits,
    expected,
    laid_out,
    project,
    requested,
    rows_of_every_kind,
    rows_of_sums,
    run_python,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import VECTORS

from poc_kernels import (
    RandomProjection,
    backends,
    definition,
    projection_entries,
    projection_matrix,
    random_projection,
    reference,
    residual_projection,
    seed_tensor,
)
from poc_kernels.kernels import self_test, trial
from poc_kernels.kernels.cuda import launcher
from poc_kernels.protocol import inputs, permutations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda", 0)
SHAPES = [(1, 1), (1, 1000), (3, 63), (17, 64), (33, 129), (64, 1000), (65, 2048), (200, 515), (300, 4096)]


def test_the_reference_gives_the_vectors():
    assert self_test.wrong_answers(PLAIN, GPU, VECTORS) == []


def test_the_chosen_backend_gives_the_vectors():
    assert self_test.wrong_answers(backends.select(GPU), GPU, VECTORS) == []


def test_machine_code_or_else_triton_serves():
    if launcher.unavailable(GPU) is None:
        assert backends.select(GPU).name == "cuda"
    else:
        pytest.importorskip("triton")
        assert backends.select(GPU).name == "triton"


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind_have_the_bits_of_the_cpu(dtype, bits):
    x = rows_of_every_kind(70, 1000, dtype, bits)
    mask = torch.arange(70) % 3 != 0
    y = project(PLAIN, x.to(GPU), activation_bits=bits, row_mask=mask.to(GPU))
    assert y.device == GPU
    assert_same_bits(y, expected(x, activation_bits=bits, row_mask=mask))


def test_a_round_on_the_gpu():
    x = rows_of_every_kind(7, 64, torch.bfloat16, 3)
    projections = RandomProjection(5, 64).to(GPU)
    assert projections.seed.device == GPU
    y = projections.post(projections.pre(x.to(GPU)))
    assert_same_bits(y, expected(expected(x, seed=5), seed=5, domain=1))


# ---- the chosen backend against the CPU ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_shapes(rows, k, dtype, bits):
    x = rows_of_every_kind(rows, k, dtype, rows + k)
    seed = seed_tensor(-3)
    y = residual_projection(x.to(GPU), seed.to(GPU), activation_bits=bits)
    assert_same_bits(y, residual_projection(x, seed, activation_bits=bits))
    y = random_projection(x.to(GPU), seed.to(GPU), 77, domain=2, activation_bits=bits, column_start=2**32 - 100)
    assert_same_bits(y, random_projection(x, seed, 77, domain=2, activation_bits=bits, column_start=2**32 - 100))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=10)
def test_random_calls(dtype, bits, data):
    rows, k = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 700))
    seed = seed_tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    start = data.draw(st.integers(0, k - 1))
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(k)) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    options = {
        "domain": data.draw(st.integers(0, 2**32 - 1)),
        "std": data.draw(st.floats(1e-6, 1e3)),
        "activation_bits": bits,
        "column_start": start,
        "columns": data.draw(st.integers(1, k - start)),
    }
    x = laid_out(rows_of_every_kind(rows, k, dtype, rows), data.draw(st.sampled_from(LAYOUTS)))
    storage = torch.empty(0, dtype=dtype).set_(x.untyped_storage()).to(GPU)
    moved = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    y = residual_projection(moved, seed.to(GPU), row_mask=mask.to(GPU), **options)
    assert_same_bits(y, residual_projection(x, seed, row_mask=mask, **options))


def test_entries_and_matrices():
    seed = seed_tensor(11)
    for window in [(0, 0, 64, 0, 64), (1, 5, 100, 7, 33), (2**32 - 1, 65500, 36, 2**32 - 10, 9), (3, 0, 1, 0, 1)]:
        assert_same_bits(projection_entries(seed.to(GPU), *window), projection_entries(seed, *window))
        for dtype in DTYPES:
            matrix = projection_matrix(seed.to(GPU), *window, dtype=dtype)
            assert_same_bits(matrix, projection_matrix(seed, *window, dtype=dtype))


@pytest.mark.parametrize("bits", [16, 8])
def test_a_row_does_not_depend_on_its_batch(bits):
    x, seed = rows_of_every_kind(300, 1000, torch.bfloat16, 4).to(GPU), seed_tensor(5, GPU)
    whole = residual_projection(x, seed, activation_bits=bits)
    for rows in (1, 2, 16, 17, 64, 65, 128, 129, 299):
        assert_same_bits(residual_projection(x[:rows], seed, activation_bits=bits), whole[:rows], f"{rows} rows")
    assert_same_bits(residual_projection(x[123:124], seed, activation_bits=bits), whole[123:124])


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [3, 200])
def test_shards_make_the_whole(rows, bits):
    x, seed = rows_of_every_kind(rows, 1000, torch.float16, 6).to(GPU), seed_tensor(5, GPU)
    whole = residual_projection(x, seed, activation_bits=bits)
    for count in (2, 3, 7):
        edges = [1000 * i // count for i in range(count + 1)]
        shards = [
            residual_projection(x, seed, activation_bits=bits, column_start=a, columns=b - a)
            for a, b in itertools.pairwise(edges)
        ]
        assert_same_bits(torch.cat(shards, dim=1), whole, f"{count} shards")


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [5, 150])
def test_no_configuration_changes_a_bit(rows, bits):
    triton = pytest.importorskip("triton") and pytest.importorskip("poc_kernels.kernels.triton.product")
    from poc_kernels.kernels.triton import tiles as tile_table

    x = rows_of_every_kind(rows, 1300, torch.bfloat16, 7)
    y = expected(x, activation_bits=bits)
    for arithmetic in ("int8", "fp16"):
        for tile in tile_table.tiles(triton.hardware(GPU)[0], bits, arithmetic):
            for splits in (1, 2, 5):
                calls = triton.project(
                    x.to(GPU),
                    seed_tensor(7, GPU),
                    requested(x, activation_bits=bits),
                    tile=tile,
                    splits=splits,
                    arithmetic=arithmetic,
                )
                assert_same_bits(calls, y, f"{tile}, {splits} splits, {arithmetic}")


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
def test_sums_beyond_32_bits_are_exact_and_rounded_once(arithmetic, splits):
    """Near the limit of each accumulator, which a GPU's matrix units have to keep, and near ties of float32."""
    triton = pytest.importorskip("triton") and pytest.importorskip("poc_kernels.kernels.triton.product")
    from poc_kernels.kernels.triton import tiles as tile_table

    k, columns = definition.MAX_FEATURES, 3
    signs = reference.entries(seed_tensor(7), 0, 0, k, 0, columns).sign().float().t()
    largest = torch.cat([signs, -signs, torch.ones(1, k)]) * torch.tensor([1 - 2.0**-20, 1.0, 0.51]).repeat(3)[:7, None]
    for x, bits in itertools.product((largest, rows_of_sums(NEAR_ROUNDINGS, 4096, seed=7)), (16, 8)):
        y = expected(x, activation_bits=bits, residual=False, columns=columns)
        for tile in tile_table.tiles(triton.hardware(GPU)[0], bits, arithmetic)[:: 2 if splits > 1 else 1]:
            result = triton.project(
                *(x.to(GPU), seed_tensor(7, GPU)),
                requested(x, activation_bits=bits, residual=False, columns=columns),
                tile=tile,
                splits=splits,
                arithmetic=arithmetic,
            )
            assert_same_bits(result, y, f"{bits} bits, {tile}")


@pytest.mark.parametrize("columns", [2**31 - 1, 2**32 - 1])
def test_columns_up_to_the_limit_of_the_definition(columns):
    if torch.cuda.mem_get_info(GPU)[0] < 2 * columns + 2**30:
        pytest.skip("the result alone takes more memory than is free")
    x, seed = rows_of_every_kind(1, 16, torch.bfloat16, 5).to(GPU), seed_tensor(5, GPU)
    y = random_projection(x, seed, columns)
    for start in (0, 2**31 - 1500, columns - 500):
        part = y[:, start : start + 500]
        assert_same_bits(part, random_projection(x, seed, 500, column_start=start))


# ---- forms of a call -----------------------------------------------------------------------------------------------


def test_opcheck():
    x, seed = rows_of_every_kind(5, 40, torch.bfloat16, 1).nan_to_num(0, 1, -1).to(GPU), seed_tensor(9, GPU)
    ops = torch.ops.poc_kernels
    torch.library.opcheck(ops.residual_projection, (x, seed), {"activation_bits": 8})
    torch.library.opcheck(ops.random_projection, (x, seed, 70))
    torch.library.opcheck(ops.projection_entries, (seed, 0, 3, 40, 5, 60))
    torch.library.opcheck(ops.projection_matrix, (seed, 0, 3, 40, 5, 60))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_serves_every_seed_without_recompiling(backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    x = rows_of_every_kind(6, 40, torch.float32, 2)
    compiled = torch.compile(lambda x, seed: residual_projection(2 * x, seed), fullgraph=True, backend=backend)
    compiled(x.to(GPU), seed_tensor(0, GPU))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, -5, 2**62):
            y = compiled(x.to(GPU), seed_tensor(seed, GPU))
            assert_same_bits(y, residual_projection(2 * x, seed_tensor(seed)), f"seed {seed}")


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_captured_graph_replays_with_a_new_seed_and_new_rows(rows, bits):
    if backends.select(GPU).name == "reference":
        pytest.skip("the reference moves constants to the GPU, which no graph captures")
    x, seed = torch.zeros(rows, 512, dtype=torch.bfloat16, device=GPU), seed_tensor(0, GPU)
    side = torch.cuda.Stream(GPU)
    side.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(side):
        residual_projection(x, seed, activation_bits=bits)  # compiles
    torch.cuda.current_stream(GPU).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = residual_projection(x, seed, activation_bits=bits)
    for value in (1, -7, 2**63 - 1):
        new = rows_of_every_kind(rows, 512, torch.bfloat16, value % 100)
        x.copy_(new)
        seed.fill_(value)
        graph.replay()
        assert_same_bits(y, residual_projection(new, seed_tensor(value), activation_bits=bits), f"seed {value}")


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_captured_graph_replays_with_another_row_mask(rows, bits):
    if backends.select(GPU).name == "reference":
        pytest.skip("the reference moves constants to the GPU, which no graph captures")
    backends.warmup(GPU, 512, activation_bits=bits)
    x, seed = rows_of_every_kind(rows, 512, torch.bfloat16, rows), seed_tensor(11)
    moved, moved_seed, mask = x.to(GPU), seed.to(GPU), torch.ones(rows, dtype=torch.bool, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = residual_projection(moved, moved_seed, activation_bits=bits, row_mask=mask)
    index = torch.arange(rows)
    for wanted in (index >= 0, index < 0, index % 3 == 0, index % 2 == 1, index == rows - 1):
        mask.copy_(wanted)
        graph.replay()
        assert_same_bits(y, residual_projection(x, seed, activation_bits=bits, row_mask=wanted))


# In a process of its own: nothing is compiled there, and no module of a kernel loaded, but what the warmup takes.
CAPTURE_AFTER_WARMUP = """
import torch
from poc_kernels import backends, residual_projection, seed_tensor

gpu, dim = torch.device("cuda", 0), 1000
backends.warmup(gpu, dim, dtype=torch.bfloat16)
if backends.select(gpu).name == "reference":
    print("reference")
    raise SystemExit
x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
seed = seed_tensor(7)
memory, moved_seed = x.to(gpu), seed.to(gpu)
torch.cuda.synchronize(gpu)
right = []
for rows, start, columns in ((3, 0, dim), (64, 16, 512), (65, 3, 100), (300, 0, dim)):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = residual_projection(memory[:rows, :dim], moved_seed, column_start=start, columns=columns)
    graph.replay()
    expected = residual_projection(x[:rows, :dim], seed, column_start=start, columns=columns)
    right.append(torch.equal(y.cpu().view(torch.int16), expected.view(torch.int16)))
print(all(right), len(right))
"""


def test_shapes_are_captured_right_after_a_warmup(tmp_path):
    printed = run_python(CAPTURE_AFTER_WARMUP, tmp_path)
    if printed == "reference":
        pytest.skip("the reference moves constants to the GPU, which no graph captures")
    assert printed == "True 4"


def test_a_first_use_in_a_capture_is_refused_and_the_next_one_served(fresh_choice):
    x, seed = torch.zeros(3, 512, dtype=torch.bfloat16, device=GPU), seed_tensor(0, GPU)
    torch.cuda.synchronize(GPU)
    with pytest.raises(RuntimeError, match="cannot be chosen while"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        residual_projection(x, seed)
    assert not trial.verdicts
    assert_same_bits(residual_projection(x, seed), torch.zeros_like(x))


@pytest.fixture
def compilations():
    """What Triton compiles, by the name of the kernel."""
    knobs = pytest.importorskip("triton").knobs
    compiled, before = [], knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **options: compiled.append(options["repr"])
    yield compiled
    knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dim", [1024, 1000])
def test_nothing_is_compiled_after_warmup(compilations, dim, bits):
    backends.warmup(GPU, dim, dtype=torch.bfloat16, activation_bits=bits)
    compilations.clear()
    seeds, memory = torch.arange(3, device=GPU), torch.zeros(1100 * 1100, dtype=torch.bfloat16, device=GPU)
    for i, rows in enumerate([1, 2, 3, 16, 17, 33, 64, 65, 128, 129, 300, 1024, 1025]):
        mask = torch.arange(rows, device=GPU) % 3 != 0
        for stride, offset in [(dim, 0), (1024, 3), (1027, 8), (0, 0)]:
            x = memory.as_strided((rows, dim), (stride, 1), offset)
            for start, columns in [(0, dim), (dim // 2, dim - dim // 2), (3, 250), (16, 256), (dim - 7, 7)]:
                shard = {"column_start": start, "columns": columns, "activation_bits": bits}
                residual_projection(x, seeds[i % 3], domain=i, row_mask=mask if start else None, **shard)
    assert not compilations


@pytest.fixture
def waiting_is_an_error():
    """A function; after its call, torch raises where an operator waits for the GPU."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu(waiting_is_an_error):
    if backends.select(GPU).name == "reference":
        pytest.skip("the reference moves constants to the GPU and waits for them")
    x, seed = rows_of_every_kind(40, 1000, torch.bfloat16, 3).to(GPU), seed_tensor(4, GPU)
    mask = torch.arange(40, device=GPU) % 3 != 0
    for _ in range(2):  # the first time may choose and compile
        residual_projection(x, seed, row_mask=mask)
        inputs.nonce_inputs("block", "key", [1, 2], 5, 13, GPU, torch.bfloat16)
        inputs.hash32([1, 2], 0, 1000, GPU)
        waiting_is_an_error()


@pytest.mark.parametrize(("rows", "k"), [(3, 1000), (200, 1000), (3, 4096)])  # the last with K in parts
def test_two_streams_at_once(rows, k):
    batches = [rows_of_every_kind(rows, k, torch.bfloat16, 8 + i) for i in range(2)]
    wanted = [residual_projection(batch, seed_tensor(i)) for i, batch in enumerate(batches)]
    moved = [batch.to(GPU) for batch in batches]
    seeds = [seed_tensor(i, GPU) for i in range(2)]
    streams = [torch.cuda.Stream(GPU) for _ in range(2)]
    for x, seed in zip(moved, seeds, strict=True):
        residual_projection(x, seed)  # compiles, which would take longer than the streams wait below
    torch.cuda.synchronize(GPU)
    results: list[list[torch.Tensor]] = [[], []]
    for stream in streams:  # so that kernels queue up behind this, and run faster than they are launched
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(residual_projection(moved[i], seeds[i]))
    torch.cuda.synchronize(GPU)
    for i, wanted_of_stream in enumerate(wanted):
        for turn, y in enumerate(results[i]):
            assert_same_bits(y, wanted_of_stream, f"stream {i}, turn {turn}")


def test_a_call_waits_for_what_its_own_stream_does_first():
    x, seed = rows_of_every_kind(40, 1000, torch.float32, 3), seed_tensor(4, GPU)
    moved, busy = torch.zeros(40, 1000, device=GPU), torch.ones(4096, 4096, device=GPU)
    stream = torch.cuda.Stream(GPU)
    torch.cuda.synchronize(GPU)
    with torch.cuda.stream(stream):
        for _ in range(10):
            busy = (busy @ busy).clamp_(max=1.0)
        moved.copy_(x)
        y = residual_projection(moved, seed)
    stream.synchronize()
    assert_same_bits(y, residual_projection(x, seed_tensor(4)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_what_lies_on_another_device_than_the_current_one():
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for rows, bits in itertools.product((3, 200), (16, 8)):
        x, seed = rows_of_every_kind(rows, 1000, torch.bfloat16, rows), seed_tensor(6)
        y = residual_projection(x.to(other), seed.to(other), activation_bits=bits)
        assert y.device == other
        assert_same_bits(y, residual_projection(x, seed, activation_bits=bits))
    entries = projection_entries(seed.to(other), 1, 5, 100, 7, 33)
    assert entries.device == other
    assert_same_bits(entries, projection_entries(seed, 1, 5, 100, 7, 33))
    drawn = inputs.normal([1, 2**32 - 1], 5001, other, torch.bfloat16)
    hashes = inputs.hash32([1, 2**32 - 1], 3, 1000, other)
    assert drawn.device == hashes.device == other
    assert_same_bits(drawn, inputs.normal([1, 2**32 - 1], 5001, CPU, torch.bfloat16))
    assert_same_bits(hashes, inputs.hash32([1, 2**32 - 1], 3, 1000, CPU))
    assert torch.cuda.current_device() == 0


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq_len", "dim"), [(1, 1), (3, 33), (64, 1000), (256, 4096)])
def test_inputs_have_the_bits_of_the_cpu(seq_len, dim, dtype):
    nonces = [5, 0, 2**40]
    drawn = inputs.nonce_inputs("block", "key", nonces, seq_len, dim, GPU, dtype)
    assert_same_bits(drawn, inputs.nonce_inputs("block", "key", nonces, seq_len, dim, CPU, dtype))


def test_permutations_are_those_of_the_cpu():
    drawn = permutations("block", "key", [3, 1], 50_021, GPU)
    assert torch.equal(drawn.cpu(), permutations("block", "key", [3, 1], 50_021))


def test_triton_draws_where_it_is_installed():
    pytest.importorskip("triton")
    assert inputs._kernels(GPU).__name__ == "poc_kernels.protocol.triton_inputs"
