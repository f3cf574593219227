"""The arithmetic of a merge on disk, which does without torch, against torch's."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from warp_lite.averaging import arrays
from warp_lite.averaging.liti import interpolate
from warp_lite.averaging.merging import merge_tensors
from warp_lite.averaging.slerp import gram

SIZES = (1, 7, 24, 1000, 70001)  # with and without what is left over beside a processor's vectors


def triple(size, dtype=torch.float32, near=1.0):
    """An init and two policies, `near` of them apart from it."""
    draw = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=draw)
    return [tensor.to(dtype) for tensor in (base, *(base + near * torch.randn(size, generator=draw) for _ in "12"))]


def assert_equal_bits(array, tensor):
    assert array.dtype == tensor.numpy().dtype and array.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("near", [1.0, 1e-3])
@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (0.70710678, 0.70710678), (-1.0, 2.0), (1.3, -0.9), (0.0, 1.0)])
@pytest.mark.parametrize("around_first", [False, True])
def test_a_merge_has_the_bits_of_torchs(size, near, coefficients, around_first):
    """Also where base and step almost cancel, (−1, 2) and (1.3, −0.9): two roundings in the place of torch's one would
    show there."""
    base, *thetas = triple(size, near=near)
    expected = merge_tensors(base, thetas, coefficients, False, around_first)
    wide = [tensor.numpy() for tensor in (base, *thetas)]
    assert_equal_bits(arrays.merge_arrays(wide[0], wide[1:], coefficients, False, around_first), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.49999999, 0.5, 0.7, 1.0, 1.5, 10.0])
def test_an_interpolation_has_the_bits_of_torchs(size, eta):
    base, theta, _ = triple(size)
    assert_equal_bits(arrays.interpolate_arrays(base.numpy(), theta.numpy(), eta), interpolate(base, theta, eta))


@pytest.mark.parametrize("eta", [0.3, 1.5])
def test_in_float64_they_agree_to_the_rounding_of_the_last_place(eta):
    base, *thetas = triple(1000, torch.float64)
    wide = [tensor.numpy() for tensor in (base, *thetas)]
    merged = arrays.merge_arrays(wide[0], wide[1:], (0.7, 0.6), False)
    torch.testing.assert_close(torch.from_numpy(merged), merge_tensors(base, thetas, (0.7, 0.6), False),
                               rtol=0, atol=1e-15)
    moved = torch.from_numpy(arrays.interpolate_arrays(*wide[:2], eta))
    torch.testing.assert_close(moved, interpolate(base, thetas[0], eta), rtol=0, atol=1e-14)


def test_what_policies_agree_on_stays_as_it_is():
    base, theta, _ = (tensor.numpy() for tensor in triple(50))
    for coefficients in ((0.3, 0.7), (0.5, 0.5)):
        assert arrays.merge_arrays(base, [theta, theta.copy()], coefficients, True).tobytes() == theta.tobytes()
    assert arrays.merge_arrays(base, [base, theta], (0.0, 1.0), False).tobytes() == theta.tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inner_products_are_summed_in_float64(dtype):
    base, *thetas = triple(70001, dtype, near=1e-3)
    products = arrays.inner_products(base.numpy(), [theta.numpy() for theta in thetas])
    np.testing.assert_allclose(products, gram(base, thetas).numpy(), rtol=1e-12)
    assert np.array_equal(products, products.T)


@pytest.mark.parametrize("dtype, code", [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_every_number_of_16_bits_is_widened_and_narrowed_as_torch_does(dtype, code):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    stored = bits.numpy().view(arrays.DTYPES[code][1])
    wide = arrays.widen_array(stored, code)
    np.testing.assert_array_equal(wide, numbers.float().numpy())  # NaN is equal to NaN here
    is_number = ~np.isnan(wide)
    assert np.array_equal(arrays.narrow_array(wide[is_number], code), stored[is_number])
    finite = np.sort(wide[np.isfinite(wide)])
    between = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # halfway: to even
    for values in (between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf)),
                   np.array([3.3999e38, -3.3999e38, 65519.9, 65520.0, 1e-40], np.float32)):
        with np.errstate(over="ignore"):
            narrowed = arrays.narrow_array(values, code)
        expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy()
        np.testing.assert_array_equal(narrowed.view(np.int16), expected)


@pytest.fixture
def folders(tmp_path):
    """An init and two policies in every dtype that is averaged, and one with NaN."""
    for seed, name in enumerate(("init", "one", "two", "nan")):
        state = {str(dtype): triple(600 + seed, dtype)[0][:600]
                 for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
        if name == "nan":
            state["torch.bfloat16"][3] = torch.nan
        (tmp_path / name).mkdir()
        save_file({**state, "steps": torch.tensor([3])}, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("arguments, code, words", [
    ("one two", 0, ""), ("one two --method lerp --eta 0.3", 0, ""), ("one", 0, ""),
    ("one missing", 2, "missing is not a folder"), ("one nan", 2, "nan['torch.bfloat16'] has NaN"),
    ("one two --method ties", 2, "method is 'ties'"), ("one two --eta -1", 2, "eta is -1"),
    ("one two --eta 1e30", 2, "the result for 'torch.float16' overflows torch.float16")])
def test_a_merge_by_the_command_line_does_not_import_torch(folders, arguments, code, words):
    program = ("import sys\nfrom warp_lite.cli import main\ncode = main(sys.argv[1:])\n"
               "assert 'torch' not in sys.modules\nsys.exit(code)")
    command = ["merge", "--out", "out", "--init", "init", "--policies", *arguments.split()]
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, *command], cwd=folders, capture_output=True,
                          text=True)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == (code == 2) and (folders / "out").exists() == (code == 0)
