"""Every kernel compiled ahead of time as its launcher asks for it, without a GPU: its resources and its instructions.

The launchers run on CPU tensors with Triton's launch replaced by a recorder; nothing is computed.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from pycompress import _ext  # noqa: E402
from pycompress.formats.codes import scales_shape, stored_shape  # noqa: E402

pytestmark = pytest.mark.slow

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with (kernel, positional arguments, named arguments) instead of anything being launched."""
    recorded = []

    def record(self, *args, grid, warmup, **named):
        recorded.append((self, args, named))

    monkeypatch.setattr(JITFunction, "run", record)
    # What no kernel writes here is read as labels: keep it in range.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    return recorded


def compiled(kernel, args, named, capability):
    """The launch compiled as Triton would specialise it: ones are constants, multiples of 16 are known as such."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, known = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                known[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dumped(file, *what):
    """What cuobjdump tells of a file."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    assert tool, "neither Triton nor CUDA brings a cuobjdump"
    return subprocess.run([tool, *what, str(file)], capture_output=True, text=True, check=True).stdout


def spills(cubin, folder):
    """Loads and stores of local memory in the machine code: registers that did not suffice."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    code = dumped(file, "-sass")
    assert "EXIT" in code
    return len(re.findall(r"\b(?:LDL|STL)\b", code))


def check(launches, capability, folder, products=()):
    """Compile what was launched; `products` names the kernels whose 16-bit or TF32 products must be the chip's own."""
    assert launches
    for kernel, args, named in launches:
        result = compiled(kernel, args, named, capability)
        where = f"{kernel.__name__} for sm_{capability}, {[str(t.dtype) for t in args if isinstance(t, torch.Tensor)]}"
        assert result.metadata.shared <= SHARED_LIMIT[capability], where
        assert spills(result.asm["cubin"], folder) == 0, where
        if kernel.__name__ in products:
            narrow = kernel.__name__ == "_few_kernel"  # of tiles for which the warpgroup's product is too tall
            assert re.search("wgmma" if capability == 90 and not narrow else "wgmma|mma.sync", result.asm["ptx"]), where
        assert ("griddepcontrol.wait" in result.asm["ptx"]) == bool(named.get("PDL")), where
    assert set(products) <= {kernel.__name__ for kernel, _, _ in launches}


def layer(share, dtype, pivoted=False, sizes=(4096, 1024, 512, 64), index=torch.int16, storage="float"):
    outputs, inputs, k, r = sizes
    count = outputs if share == "output" else inputs
    stored = count - r if pivoted else count
    stacked, other = ((k + r, inputs), (stored, r)) if share == "output" else ((outputs, k + r), (r, stored))
    channels = torch.arange(count, dtype=index) if pivoted else None
    codes = {"float": dtype, "int8": torch.int8, "int4": torch.uint8}[storage]
    shapes = stacked, other
    factors = (torch.zeros(stored_shape(*shape, storage), dtype=codes) for shape in shapes)
    scales = (None if storage == "float" else torch.zeros(scales_shape(*s, storage), dtype=dtype) for s in shapes)
    return *factors, torch.zeros(count, dtype=index), channels, torch.zeros(outputs, dtype=dtype), *scales


both = pytest.mark.parametrize("capability", [80, 90])


@both
@pytest.mark.parametrize(
    ("tokens", "dtype", "pivoted"),
    [
        (1, torch.bfloat16, False),
        (64, torch.bfloat16, False),
        (1, torch.bfloat16, True),
        (16, torch.bfloat16, True),
        (64, torch.bfloat16, True),
        (512, torch.bfloat16, True),
        (64, torch.float32, True),
    ],
    ids=str,
)
def test_shared_linear_fits_and_multiplies_on_tensor_cores(tokens, dtype, pivoted, capability, launches, tmp_path):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    for share in ("output", "input"):
        shared_linear_cuda(torch.zeros(tokens, 1024, dtype=dtype), *layer(share, dtype, pivoted), share == "input")
    products = {1: (), 16: ("_few_kernel", "_expand_kernel")}.get(tokens, ("_expand_kernel",))
    check(launches, capability, tmp_path, products)


@pytest.fixture
def early(monkeypatch):
    """Kernels that start while the one before them ends, as on a GPU of compute capability 9."""
    from pycompress.kernels import shared_linear, skinny  # both, before either is changed

    for module in (skinny, shared_linear):
        monkeypatch.setattr(module, "dependent", lambda device: True)


@pytest.mark.parametrize("tokens", [1, 64])
def test_kernels_of_a_few_tokens_start_early_on_hopper(tokens, launches, early, tmp_path):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    for share in ("output", "input"):
        x = torch.zeros(tokens, 1024, dtype=torch.bfloat16)
        shared_linear_cuda(x, *layer(share, torch.bfloat16, True), share == "input")
    in_turn = [launch for launch in launches if launch[0].__name__ not in ("_invert_kernel", "_group_kernel")]
    assert all(named["PDL"] and named["launch_pdl"] for kernel, _, named in in_turn if "sum" not in kernel.__name__)
    check(launches, 90, tmp_path)


@both
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_shared_linear_of_codes_fits_and_multiplies_on_tensor_cores(storage, capability, launches, tmp_path):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    sizes = (4096, 1088, 512, 64)
    for tokens in (1, 16, 512):
        for share in ("output", "input") if tokens == 16 else ("output",):
            x = torch.zeros(tokens, 1088, dtype=torch.bfloat16)
            given = layer(share, torch.bfloat16, True, sizes, storage=storage)
            shared_linear_cuda(x, *given, share == "input")
    check(launches, capability, tmp_path, ("_few_kernel",))
    assert "_dequantize_kernel" in {kernel.__name__ for kernel, _, _ in launches}


@both
@pytest.mark.parametrize("pivoted", [False, True])
def test_shared_linear_fits_in_float16_and_at_odd_sizes(pivoted, capability, launches, tmp_path):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    for share in ("output", "input"):
        odd = layer(share, torch.float16, pivoted, (63, 1001, 9, 5), torch.int32)
        for tokens in (13, 33):
            shared_linear_cuda(torch.zeros(tokens, 1001, dtype=torch.float16), *odd, share == "input")
    check(launches, capability, tmp_path, ("_few_kernel",))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_fits_and_multiplies_on_tensor_cores(dtype, capability, launches, tmp_path):
    from pycompress.kernels.gram import gram_cuda

    gram_cuda(torch.zeros(512, 512, dtype=dtype) if dtype != torch.float16 else torch.zeros(63, 65, dtype=dtype))
    check(launches, capability, tmp_path, ("_gram_kernel",))


@both
@pytest.mark.parametrize("n", [63, 4096])
def test_seeding_fits(n, capability, launches, tmp_path):
    from pycompress.kernels.seeding import kmeans_plus_plus_cuda

    kmeans_plus_plus_cuda(torch.zeros(1, 1, 1).expand(1, n, n), torch.zeros(1, 9, 8), torch.ones(1, n))
    check(launches, capability, tmp_path)


@both
def test_lloyd_fits_on_a_gram_matrix_and_multiplies_on_tensor_cores_on_points(capability, launches, tmp_path):
    from pycompress.kernels.lloyd import lloyd_cuda, lloyd_points_cuda

    seeds = torch.arange(16)[None]
    lloyd_cuda(torch.zeros(1, 256, 256), seeds, 0)
    lloyd_points_cuda(torch.zeros(1, 63, 65), seeds, 0)
    check(launches, capability, tmp_path, ("_nearest_point_kernel",))


@both
def test_centring_of_the_low_rank_iteration_fits(capability, launches, tmp_path):
    from pycompress.kernels.segments import group_by_label, segment_centre_

    groups = group_by_label(torch.zeros(1, 64, dtype=torch.int64), 5)
    segment_centre_(torch.zeros(1, 64, 160), *groups)
    check(launches, capability, tmp_path)


@pytest.mark.skipif(not isinstance(_ext.build_info()["cuda"], list), reason="the CUDA kernels were not built")
@both
def test_cuda_kernels_fit_and_multiply_on_tensor_cores(capability):
    import pycompress._C

    architecture = f"sm_{capability}" + ("a" if capability == 90 else "")
    usage = dumped(pycompress._C.__file__, "-arch", architecture, "--dump-resource-usage")
    found = re.findall(r"Function (\S*):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len([name for name, *_ in found if "kernel" in name]) >= 9  # of three dtypes, whole and not, and the folds
    for name, registers, stack, shared, local in found:
        assert int(stack) == int(local) == 0, name
        assert int(shared) <= 48 << 10, name
        assert int(registers) < 255, name
    code = dumped(pycompress._C.__file__, "-arch", architecture, "-sass")
    for body in code.split("Function : ")[1:]:
        assert not re.search(r"\b(?:LDL|STL)\b", body), body[:200]
        if "fold" not in body.split("\n")[0]:
            assert "HMMA" in body, body[:200]
            assert "LDG.E.128" in body, body[:200]


@both
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_subnet_linear_fits_and_multiplies_on_tensor_cores(tokens, transposed, capability, launches, tmp_path):
    from pycompress.kernels.subnet_linear import subnet_linear_cuda

    weight, bias = torch.zeros(4096, 1024, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    weight = weight.T.contiguous().T if transposed else weight
    rows, columns = torch.zeros(2048, dtype=torch.int64), torch.zeros(512, dtype=torch.int64)
    subnet_linear_cuda(torch.zeros(tokens, 512, dtype=torch.bfloat16), weight, bias, rows, columns)
    check(launches, capability, tmp_path, () if tokens == 1 else ("_product_kernel",))


@both
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float16, False), (torch.float32, True)], ids=str)
def test_subnet_linear_fits_at_odd_sizes_and_for_many_tokens(dtype, transposed, capability, launches, tmp_path):
    from pycompress.kernels.subnet_linear import subnet_linear_cuda

    weight = torch.zeros(1001, 63, dtype=dtype).T if transposed else torch.zeros(63, 1001, dtype=dtype)
    rows, columns = torch.zeros(31, dtype=torch.int64), torch.zeros(501, dtype=torch.int64)
    for tokens in (33, 65):
        subnet_linear_cuda(torch.zeros(tokens, 501, dtype=dtype), weight, None, rows, columns)
    check(launches, capability, tmp_path, ("_product_kernel",))
