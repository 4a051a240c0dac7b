"""Bad input raises before anything is computed, and the message helps.

Every message must name the argument, what came, and what is allowed; the tests look for those and
leave the wording free. Both backends raise the same.
"""

import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import gaussian

SHAPE = (6, 4)
WEIGHTS = ("inside_weights", "outside_weights")
TENSORS = ("target", *WEIGHTS, "sigma", "beta", "normalizer")


def _raises(
    error: type[Exception], function: Callable[[], Any], *parts: str, either: tuple[str, ...] = ()
) -> str:
    """Assert that the function raises exactly this, with each of `parts` and one of `either`.

    Returns the message.
    """
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), f"{message!r} does not say {part!r}"
    assert not either or any(re.search(part, message) for part in either), message
    return message


def _call(device: str, **changes: Any) -> Callable[[], Tensor]:
    arguments: dict[str, Any] = {
        "input": gaussian(*SHAPE, seed=1, device=device),
        "target": gaussian(*SHAPE, seed=2, device=device),
    } | changes
    return lambda: smooth_l1_loss(**arguments)


@pytest.mark.parametrize("shape", [(6, 1), (1, 4), (4,), (4, 6), (6, 4, 1), (), (0, 4)], ids=str)
def test_target_of_another_shape(shape: tuple[int, ...], backend: str, device: str) -> None:
    """Torch warns and broadcasts, and the loss of (N, 1) against (N,) is then N² numbers."""
    call = _call(device, target=torch.zeros(shape, device=device))
    _raises(ValueError, call, "target", re.escape(str(shape)), re.escape(str(SHAPE)))


WRONG_SHAPES = [
    ((5, 4), "does not broadcast"),
    ((3,), "does not broadcast"),
    ((6,), "does not broadcast: the rows are the first dimension, not the last"),
    ((6, 2), "does not broadcast"),
    ((0, 4), "does not broadcast"),
    ((0,), "does not broadcast"),
    ((2, 6, 4), "would widen the input"),
    ((1, 6, 4), "would add a dimension"),
    ((1, 1, 1), "would add a dimension"),
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in WEIGHTS for dtype in (torch.float32, torch.bool, torch.int64)),
        ("sigma", torch.float32),
        ("beta", torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [s for s, _ in WRONG_SHAPES], ids=[f"{s}" for s in WRONG_SHAPES])
def test_tensors_that_do_not_broadcast(
    shape: tuple[int, ...], name: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    call = _call(device, **{name: torch.ones(shape, dtype=dtype, device=device)})
    parts = (re.escape(str(shape)), re.escape(str(SHAPE)), "broadcast")
    _raises(ValueError, call, name, *parts)


# Shapes of the input and of a tensor that does not broadcast to it, and the way out.
WAYS_OUT = [
    ((6, 4), (6,), "[:, None]"),  # rows
    ((2, 5, 8), (2, 5), "[:, :, None]"),  # tokens of hidden states
    ((2, 5, 8), (2,), "[:, None, None]"),
    ((2, 5, 8), (5,), "[:, None]"),
    ((2, 3, 5, 7), (2, 5, 7), "[:, None, :, :]"),  # pixels
    ((2, 3, 5, 7), (2, 5), "[:, None, :, None]"),
    ((4, 1, 5, 7), (4, 5, 7), "[:, None, :, :]"),
    ((2, 3, 4), (2, 1), "[:, None, :]"),
    ((8,), (5, 1), ""),
    ((4, 1, 4, 32), (4,), ""),  # samples, or rows of pixels?
    ((4, 4, 8), (4,), ""),
    ((3, 3, 4, 4, 8), (3, 4), ""),
    ((8,), (8, 1), ".squeeze(1)"),
    ((8,), (1, 8), ".squeeze(0)"),
    ((2, 5, 7), (2, 1, 5, 7), ".squeeze(1)"),
    ((6, 4), (6, 1, 1), ".squeeze(1)"),  # or the other one: the same
    ((4, 4), (4, 1, 4), ".squeeze(1)"),
    ((4, 4), (1, 4, 1), ""),  # rows, or columns?
    ((6, 4), (4, 1), ""),
    ((6, 4), (1, 6), ""),
    ((6, 4), (5,), ""),
    ((6, 4), (6, 2), ""),
    ((6, 4), (4, 6), ""),
]


@pytest.mark.parametrize("name", [*WEIGHTS, "sigma", "beta"])
@pytest.mark.parametrize(("full", "shape", "way_out"), WAYS_OUT, ids=str)
def test_the_way_out_is_shown_where_there_is_one(
    full: tuple[int, ...], shape: tuple[int, ...], way_out: str, name: str, device: str
) -> None:
    """And it is one."""
    input, value = torch.zeros(full, device=device), torch.ones(shape, device=device)
    message = _raises(ValueError, _call(device, input=input, target=input, **{name: value}), name)
    _, _, shown = message.partition(": pass ")
    assert shown == (f"{name}{way_out}" if way_out else "")
    if way_out:
        smooth_l1_loss(input, input, **{name: eval(shown, {name: value})})


@pytest.mark.parametrize(
    ("shape", "full", "helps"),
    [
        ((64,), (64, 1), True),  # a value function's output and its returns
        ((64, 1), (64,), True),
        ((1, 64), (64, 1), False),  # transposed, perhaps
        ((4, 1, 4), (4, 4, 1), False),
        ((2, 5, 7), (2, 1, 5, 7), True),
        ((64,), (64, 4), False),
        ((4, 64), (64, 4), False),
        ((), (4,), False),
    ],
    ids=str,
)
def test_the_way_out_for_targets(
    shape: tuple[int, ...], full: tuple[int, ...], helps: bool, device: str
) -> None:
    input, target = torch.zeros(full, device=device), torch.zeros(shape, device=device)
    message = _raises(ValueError, _call(device, input=input, target=target), "target")
    _, _, shown = message.partition(": pass ")
    assert shown == ("target.reshape_as(input)" if helps else "")
    if helps:
        smooth_l1_loss(input, eval(shown, {"input": input, "target": target}))


@pytest.mark.parametrize("name", [*WEIGHTS, "sigma", "beta"])
@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 1)], ids=str)
def test_tensors_that_would_widen_a_size_of_1_or_0(
    shape: tuple[int, ...], name: str, backend: str, device: str
) -> None:
    """Broadcasting goes to the input's shape only, also where the input itself would broadcast."""
    small = torch.zeros(1, device=device)
    wide = torch.ones(shape, device=device)
    _raises(ValueError, _call(device, input=small, target=small, **{name: wide}), name)
    empty = torch.zeros(0, 2, device=device)
    wide = torch.ones(3, 2, device=device)
    _raises(ValueError, _call(device, input=empty, target=empty, **{name: wide}), name)


NOT_FLOATS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128]


@pytest.mark.parametrize("name", ["input", "target"])
@pytest.mark.parametrize("dtype", NOT_FLOATS, ids=str)
def test_dtype_of_input_and_target(
    dtype: torch.dtype, name: str, backend: str, device: str
) -> None:
    call = _call(device, **{name: torch.ones(SHAPE, dtype=dtype, device=device)})
    said = str(dtype).removeprefix("torch.")
    way_out = () if dtype.is_complex else (rf"{name}\.float\(\)",)
    _raises(TypeError, call, name, said, "float32", "float16", *way_out)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(dtype: torch.dtype, name: str, backend: str, device: str) -> None:
    call = _call(device, **{name: torch.ones(SHAPE, dtype=dtype, device=device)})
    _raises(TypeError, call, name, "complex", either=("float32", "real"))


@pytest.mark.parametrize("name", ["input", "target"])
@pytest.mark.parametrize("value", [1.0, 2, None, [1.0, 2.0], np.zeros(SHAPE), "loss"], ids=repr)
def test_not_a_tensor(value: Any, name: str, backend: str, device: str) -> None:
    call = _call(device, **{name: value})
    _raises(TypeError, call, name, type(value).__name__, "Tensor")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "value",
    [[1.0, 2.0], np.ones(SHAPE), 1j, object()],
    ids=lambda value: type(value).__name__,
)
def test_weights_that_are_neither_number_nor_tensor(
    value: Any, name: str, backend: str, device: str
) -> None:
    call = _call(device, **{name: value})
    message = _raises(TypeError, call, name, type(value).__name__, "Tensor")
    assert ("number" in message) == (name == "outside_weights")
    assert ("torch.as_tensor" in message) == hasattr(value, "__len__")


@pytest.mark.parametrize("value", [0.111, 0, 3, 1 / 9, np.float32(0.5), Fraction(1, 4)], ids=repr)
def test_numbers_are_no_inside_weights(value: Any, backend: str, device: str) -> None:
    """In detectron2 and fvcore the third argument is beta."""
    pair = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    message = (
        f"inside_weights must be a torch.Tensor, got {value}: "
        f"for the transition point pass beta={value}"
    )
    assert _raises(TypeError, lambda: smooth_l1_loss(*pair, value, reduction="sum")) == message
    assert _raises(TypeError, lambda: SmoothL1Loss()(*pair, value)) == message


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (0.5, "inside_weights must be a torch.Tensor, got .*beta="),
        (3, "inside_weights must be a torch.Tensor, got .*beta="),
        (True, "inside_weights must be a torch.Tensor, got True: a mask"),
        ("sum", "inside_weights must be a torch.Tensor, got .*: reduction goes by name"),
        (torch.ones(6), r"inside_weights must broadcast .*: pass inside_weights\[:, None\]"),
        (None, r"target must have input.*: pass target.reshape_as\(input\)"),
    ],
    ids=["float", "int", "bool", "str", "rows", "target"],
)
def test_messages_of_compiled_functions(argument: Any, said: str, dynamic: bool) -> None:
    """With a graph for all of it, the message is in the compiler's; otherwise it is the same."""
    input, target = gaussian(6, 4, seed=1), gaussian(6, 4, seed=2)
    operands = (input, target, argument) if argument is not None else (input, target[:, None])
    errors = []
    for fullgraph in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *operands: smooth_l1_loss(*operands),
            backend="eager",
            dynamic=dynamic,
            fullgraph=fullgraph,
        )
        # (PyTorch 2.9 does not tell of every exception.)
        shown = "" if fullgraph and torch.__version__ < "2.10" else said
        with pytest.raises(Exception, match=shown) as caught:
            compiled(*operands)
        errors.append(caught.value)
    with pytest.raises(type(errors[1])) as plain:
        smooth_l1_loss(*operands)
    assert str(errors[1]) == str(plain.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_arguments_of_other_libraries_in_the_place_of_weights(
    name: str, backend: str, device: str
) -> None:
    """PyTorch's size_average and reduce, and a reduction by position."""
    for flag in (True, False):
        call = _call(device, **{name: flag})
        _raises(TypeError, call, name, f"got {flag}", "size_average", "reduction", "bool tensor")
    for text in ("sum", "mask"):
        call = _call(device, **{name: text})
        _raises(TypeError, call, name, f"got '{text}'", "reduction goes by name")


@pytest.mark.parametrize("name", TENSORS)
def test_devices_that_differ(name: str, backend: str, device: str) -> None:
    """Both devices are named; `meta` stands for a second GPU."""
    shape = () if name == "normalizer" else SHAPE
    call = _call(device, reduction="sum", **{name: torch.ones(shape, device="meta")})
    _raises(ValueError, call, name, "meta", rf"{device}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")
@pytest.mark.parametrize("name", TENSORS)
def test_tensor_left_on_the_cpu(name: str, backend: str) -> None:
    shape = () if name == "normalizer" else SHAPE
    call = _call("cuda", reduction="sum", **{name: torch.ones(shape)})
    _raises(ValueError, call, name, "cpu", "cuda")


@pytest.mark.parametrize("reduction", ["Mean", "avg", "", "sum ", "batch_mean", None, True, 1])
def test_unknown_reduction(reduction: Any, backend: str, device: str) -> None:
    allowed = ("reduction", "none", "sum", "mean", "batchmean", re.escape(repr(reduction)))
    _raises(ValueError, _call(device, reduction=reduction), *allowed)
    _raises(ValueError, lambda: SmoothL1Loss(reduction=reduction), *allowed)


@pytest.mark.parametrize(("sigma", "beta"), [(3.0, 1 / 9), (1.0, 1.0), (math.inf, 0.0), (1, 0)])
def test_sigma_and_beta(sigma: float, beta: float, backend: str, device: str) -> None:
    """Also where they agree: a reader should not have to check."""
    parts = ("sigma", "beta", re.escape(f"{sigma}"), re.escape(f"{beta}"))
    _raises(ValueError, _call(device, sigma=sigma, beta=beta), *parts)
    _raises(ValueError, lambda: SmoothL1Loss(sigma=sigma, beta=beta), *parts)


@pytest.mark.parametrize("sigma", [0, 0.0, -0.0, -1, -3.0, math.nan, -math.inf])
def test_sigma_out_of_range(sigma: float, backend: str, device: str) -> None:
    parts = ("sigma", re.escape(f"{sigma}"), r"\(0, inf\]|> 0|positive|above 0")
    _raises(ValueError, _call(device, sigma=sigma), *parts)
    _raises(ValueError, lambda: SmoothL1Loss(sigma=sigma), *parts)


@pytest.mark.parametrize("beta", [-1, -1e-30, math.nan, math.inf, -math.inf])
def test_beta_out_of_range(beta: float, backend: str, device: str) -> None:
    parts = ("beta", re.escape(f"{beta}"), r"\[0, inf\)|>= 0|negative")
    _raises(ValueError, _call(device, beta=beta), *parts)
    _raises(ValueError, lambda: SmoothL1Loss(beta=beta), *parts)


@pytest.mark.parametrize("name", ["sigma", "beta"])
@pytest.mark.parametrize("value", ["3", 1j, [1.0], True, np.ones(1)], ids=repr)
def test_sigma_and_beta_are_numbers_or_tensors(
    value: Any, name: str, backend: str, device: str
) -> None:
    parts = (name, type(value).__name__, "number", "Tensor")
    _raises(TypeError, _call(device, **{name: value}), *parts)
    _raises(TypeError, lambda: SmoothL1Loss(**{name: value}), *parts)


@pytest.mark.parametrize("name", ["sigma", "beta"])
@pytest.mark.parametrize("dtype", NOT_FLOATS, ids=str)
def test_dtype_of_sigma_and_beta(dtype: torch.dtype, name: str, backend: str, device: str) -> None:
    value: Any = torch.ones((), dtype=dtype, device=device)
    parts = (name, str(dtype).removeprefix("torch."), "float32", "float16")
    _raises(TypeError, _call(device, **{name: value}), *parts)
    _raises(TypeError, lambda: SmoothL1Loss(**{name: value}), *parts)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_both_tensors(requires_grad: bool, backend: str, device: str) -> None:
    """Their values are not in the message: the host would have to wait for them."""
    one = torch.tensor(0.123, device=device, requires_grad=requires_grad)
    for options in ({"sigma": one, "beta": 2.5}, {"sigma": 2.5, "beta": one}):
        message = _raises(ValueError, _call(device, **options), "sigma", "beta", "Tensor", "2.5")
        assert "0.123" not in message


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
@pytest.mark.parametrize("normalizer", [1, 2.0, torch.tensor(2.0)], ids=repr)
def test_normalizer_without_sum(
    normalizer: Any, reduction: Reduction, backend: str, device: str
) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device)
    call = _call(device, reduction=reduction, normalizer=normalizer)
    _raises(ValueError, call, "normalizer", "sum", reduction)
    module = SmoothL1Loss(reduction=reduction)
    operand = torch.zeros(SHAPE, device=device)
    _raises(ValueError, lambda: module(operand, operand, normalizer=normalizer), "normalizer")


@pytest.mark.parametrize("normalizer", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_normalizer_out_of_range(normalizer: float, backend: str, device: str) -> None:
    call = _call(device, reduction="sum", normalizer=normalizer)
    _raises(ValueError, call, "normalizer", re.escape(f"{normalizer}"), "0")


@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 1), (0,), SHAPE], ids=str)
def test_normalizer_with_a_shape(shape: tuple[int, ...], backend: str, device: str) -> None:
    call = _call(device, reduction="sum", normalizer=torch.ones(shape, device=device))
    _raises(ValueError, call, "normalizer", re.escape(str(shape)))


def test_normalizer_that_requires_a_gradient(backend: str, device: str) -> None:
    """It would get none, silently."""
    normalizer = torch.tensor(2.0, device=device, requires_grad=True)
    call = _call(device, reduction="sum", normalizer=normalizer)
    _raises(ValueError, call, "normalizer", "grad")


@pytest.mark.parametrize("value", ["2", [2.0], 2j, True, np.ones(1)], ids=repr)
def test_normalizer_that_is_no_number(value: Any, backend: str, device: str) -> None:
    call = _call(device, reduction="sum", normalizer=value)
    _raises(TypeError, call, "normalizer", type(value).__name__)


def test_complex_normalizer(backend: str, device: str) -> None:
    call = _call(device, reduction="sum", normalizer=torch.tensor(2j, device=device))
    _raises(TypeError, call, "normalizer", "complex")


@pytest.mark.parametrize("shape", [(0, 4), (6, 4)], ids=str)
def test_empty_input_is_checked_too(shape: tuple[int, ...], backend: str, device: str) -> None:
    input = torch.zeros(shape, device=device)
    wrong = torch.zeros(3, 5, device=device)
    _raises(ValueError, _call(device, input=input, target=wrong), "target")
    _raises(ValueError, _call(device, input=input, target=input, inside_weights=wrong), "inside")
    call = _call(device, input=input, target=input, reduction="sum", normalizer=0)
    _raises(ValueError, call, "normalizer")


def test_nothing_is_launched_for_bad_input(device: str, launches: list[str]) -> None:
    for changes in (
        {"sigma": 0},
        {"reduction": "avg"},
        {"target": torch.zeros(6, 1, device=device)},
        {"outside_weights": torch.ones(5, device=device)},
        {"normalizer": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            _call(device, **changes)()
    assert launches == []


@pytest.mark.parametrize(
    "keywords", [{"size_average": True}, {"reduce": False}, {"weight": 1.0}], ids=str
)
def test_options_are_keywords_and_unknown_ones_raise(keywords: Any, device: str) -> None:
    with pytest.raises(TypeError, match=next(iter(keywords))):
        _call(device, **keywords)()
    operand = torch.zeros(SHAPE, device=device)
    with pytest.raises(TypeError, match="positional"):
        smooth_l1_loss(operand, operand, None, None, 3.0)  # type: ignore[call-arg]


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("name", ["input", "target", "inside_weights", "outside_weights"])
def test_sparse(name: str, layout: torch.layout, backend: str, device: str) -> None:
    call = _call(device, **{name: torch.ones(SHAPE, device=device).to_sparse(layout=layout)})
    _raises(TypeError, call, name, "sparse", "dense")


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ["input", "target", "inside_weights", "outside_weights"])
def test_nested(name: str, layout: torch.layout, backend: str, device: str) -> None:
    """The way out that the message shows is one."""
    parts = [torch.ones(rows, 4, device=device) for rows in (2, 3)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    way_out = f"torch.nested.to_padded_tensor({name}, 0.0)"
    _raises(TypeError, _call(device, **{name: nested}), name, "nested", re.escape(way_out))
    padded = eval(way_out, {"torch": torch, name: nested})
    assert smooth_l1_loss(padded, torch.zeros_like(padded), reduction="sum").item() == 5 * 4 / 2


@pytest.mark.parametrize("name", ["input", "target"])
def test_masked_tensor(name: str, backend: str, device: str) -> None:
    """PyTorch's own answer, as for its own loss: an operation is not supported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MaskedTensor is a prototype
        masked = torch.masked.masked_tensor(
            torch.ones(SHAPE, device=device), torch.ones(SHAPE, dtype=torch.bool, device=device)
        )
        _raises(TypeError, _call(device, **{name: masked}), "MaskedTensor")


def test_numpy_bool_is_told_from_bool(backend: str, device: str) -> None:
    """A bool would be a mask, so the message must not say that a bool came."""
    for name in ("inside_weights", "outside_weights", "normalizer"):
        call = _call(device, reduction="sum", **{name: np.bool_(True)})
        _raises(TypeError, call, name, r"numpy\.bool")


@pytest.mark.parametrize(
    "name", ["sigma", "beta", "inside_weights", "outside_weights", "normalizer"]
)
def test_number_beyond_floats(name: str, backend: str, device: str) -> None:
    _raises(ValueError, _call(device, reduction="sum", **{name: 10**400}), name, "float")


def test_smallest_normalizers(backend: str, device: str) -> None:
    """Any number above 0 is allowed, though its reciprocal be beyond float32."""
    input = torch.ones(2, device=device, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros_like(input), reduction="sum", normalizer=1e-40)
    assert loss.item() > 1e29
    assert torch.autograd.grad(loss, input)[0].tolist() == [math.inf] * 2
