"""Bad input raises before anything is computed, and the message helps.

Every message must name the argument, what came, and what is allowed; the tests look for those and
leave the rest of the wording free. Both backends raise the same.
"""

import re
import warnings
from fractions import Fraction
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.support import DEVICE, Shape, boxes

pytestmark = support.on_both

INPUTS, WEIGHTS, TRANSITIONS = "input target", "inside_weights outside_weights", "sigma beta"
TAKE_NUMBERS = f"{WEIGHTS} {TRANSITIONS} normalizer"
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
FLOAT = (torch.float32,)


def size(value: Any) -> Shape:
    return tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else ()


def bad(error: type, names: str, values: list[Any], said: str, **others: Any) -> list[Any]:
    """Return a case for each name of an argument and each value that raises.

    `said` is the message behind the name. In it `...` stands for any text, {input} for the shape of
    the input, and {name}, {value}, {type}, {dtype} and {shape} are of what came.
    """
    return [
        pytest.param(error, name, value, said, others, id=f"{name} {size(value) or value!r}"[:40])
        for name in names.split()
        for value in values
    ]


def of(*shapes: Shape, dtypes: tuple[torch.dtype, ...] = FLOAT) -> list[Any]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes for dtype in dtypes]


# For shapes of the input, those of tensors that do not fit, each with the way out if there is one.
NO_WAY = dict.fromkeys([(4, 1), (1, 6), (5,), (6, 2), (4, 6), (5, 4), (2, 6, 4), (0, 4), (0,)], "")
WAYS_OUT: dict[Shape, dict[Shape, str]] = {
    (6, 4): {(6,): "[:, None]", (6, 1, 1): ".squeeze(1)", (1, 6, 4): ".squeeze(0)", **NO_WAY},
    (4, 4): {(4, 1, 4): ".squeeze(1)", (1, 4, 1): ""},  # rows, or columns?
    (8,): {(8, 1): ".squeeze(1)", (1, 8): ".squeeze(0)", (5, 1): ""},
    (2, 3, 4): {(2, 1): "[:, None, :]"},
    (2, 5, 8): {(2, 5): "[:, :, None]", (2,): "[:, None, None]", (5,): "[:, None]"},  # tokens
    (2, 5, 7): {(2, 1, 5, 7): ".squeeze(1)"},
    (2, 3, 5, 7): {(2, 5, 7): "[:, None, :, :]", (2, 5): "[:, None, :, None]"},  # pixels
    (4, 1, 5, 7): {(4, 5, 7): "[:, None, :, :]"},
    (4, 1, 4, 32): {(4,): ""},  # samples, or rows of pixels?
    (4, 4, 8): {(4,): ""},
    (3, 3, 4, 4, 8): {(3, 4): ""},
    # Broadcasting goes to the input's shape only, also where the input itself would broadcast.
    (1,): {(4,): "", (3, 1): "", (1, 1): ".squeeze(0)", (1, 1, 1): ""},
    (0, 2): {(3, 2): "", (3, 5): ""},
}
# PyTorch warns and broadcasts, and the loss of (N, 1) against (N,) is then N² numbers.
FOR_TARGETS: dict[Shape, dict[Shape, str]] = {
    (6, 4): dict.fromkeys([(6, 1), (1, 4), (4,), (6,), (4, 6), (), (0, 4)], ""),
    (8,): {(8, 1): ".reshape_as(input)"},
    (8, 1): {(8,): ".reshape_as(input)", (1, 8): ""},  # the returns of values; transposed, perhaps
    (2, 1, 5, 7): {(2, 5, 7): ".reshape_as(input)"},
    (4, 4, 1): {(4, 1, 4): ""},
    (0, 2): {(3, 5): ""},
}


def misfits(names: str, said: str, *dtypes: torch.dtype) -> list[Any]:
    cases = []
    for full, ways_out in (FOR_TARGETS if names == "target" else WAYS_OUT).items():
        others = {name: torch.ones(full) for name in INPUTS.split()}
        for shape, way_out in ways_out.items():
            end = way_out and f": pass {{name}}{way_out}"
            cases += bad(ValueError, names, of(shape, dtypes=dtypes), said + end, **others)
    return cases


ALLOWED = '"none", "sum", "mean", "batchmean", got {value!r}'
PASS_BETA = "be a torch.Tensor, got {value}: for the transition point pass beta={value}"
PASS_FLOAT = "float32, float16...{dtype}: pass {name}.float()"
PADDED = "dense...nested...: pass torch.nested.to_padded_tensor({name}, 0.0)"
EMPTY = torch.zeros(0, 4)
ARRAYS = [[1.0], np.ones(4)]
TENSORS = [torch.tensor(0.123), torch.tensor(0.123, requires_grad=True)]
SUM = {"reduction": "sum"}
with warnings.catch_warnings():  # of prototypes
    warnings.simplefilter("ignore")
    SPARSE = [torch.ones(6, 4).to_sparse(), torch.ones(6, 4).to_sparse_csr()]
    kinds = (torch.jagged, torch.strided)
    NESTED = [torch.nested.as_nested_tensor(torch.ones(6, 4), layout=kind) for kind in kinds]
BAD_OPTIONS = [
    *bad(ValueError, "reduction", ["Mean", "sum ", "batch_mean", "", None, True, 1], ALLOWED),
    *bad(ValueError, "sigma", [0, 0.0, -0.0, -1, -3.0, nan, -inf], "(0, inf]...{value}"),
    *bad(ValueError, "beta", [-1, -1e-30, nan, inf, -inf], "[0, inf)...{value}"),
    *bad(ValueError, TRANSITIONS, [10**400], "float..."),
    *bad(TypeError, TRANSITIONS, ["3", 1j, [1.0], True, np.ones(1)], "number...Tensor...{type}"),
    *bad(TypeError, TRANSITIONS, of((), dtypes=COMPLEX), "float32, float16...{dtype}"),
    *bad(TypeError, TRANSITIONS, of((), dtypes=INTEGERS), PASS_FLOAT),
    # Also where they agree: a reader should not have to check.
    *bad(ValueError, "sigma", [1, 1.0, 3.0], "sigma={value} and beta=1.0...", beta=1.0),
    *bad(ValueError, "sigma", [1, inf], "sigma={value} and beta=0...", beta=0),
    # The values of tensors are not in the message: the host would have to wait for them.
    *bad(ValueError, "sigma", TENSORS, "=torch.Tensor and beta=2.5:...", beta=2.5),
    *bad(ValueError, "beta", TENSORS, "=2.5 and beta=torch.Tensor:...", sigma=2.5),
]
BAD_CALLS = [
    *misfits("target", "{shape}...{input}", torch.float32),
    *misfits(WEIGHTS, "broadcast...{input}...{shape}", torch.float32, torch.bool, torch.int64),
    *misfits(TRANSITIONS, "broadcast...{input}...{shape}", torch.float32),
    *bad(TypeError, INPUTS, of((6, 4), dtypes=INTEGERS), PASS_FLOAT),
    *bad(
        TypeError, f"{INPUTS} {WEIGHTS}", of((6, 4), dtypes=COMPLEX), "float32, float16...{dtype}"
    ),
    *bad(TypeError, f"{INPUTS} {WEIGHTS}", SPARSE, "dense...sparse...: pass {name}.to_dense()"),
    *bad(TypeError, f"{INPUTS} {WEIGHTS}", NESTED, PADDED),
    *bad(TypeError, INPUTS, [1.0, 2, None, *ARRAYS, "loss"], "torch.Tensor...{type}..."),
    *bad(TypeError, "inside_weights", [1j, slice(3)], "be a torch.Tensor, got {type}"),
    *bad(TypeError, "inside_weights", ARRAYS, "be a torch.Tensor...{type}: torch.as_tensor..."),
    *bad(TypeError, "outside_weights", [1j, slice(3)], "number or a torch.Tensor, got {type}"),
    *bad(TypeError, "outside_weights", ARRAYS, "number or...Tensor...{type}: torch.as_tensor..."),
    # In other libraries other arguments have this place: beta in detectron2 and fvcore, PyTorch's
    # size_average and reduce, and reductions by position.
    *bad(TypeError, "inside_weights", [0.111, 0, 3, np.float32(0.5), Fraction(1, 4)], PASS_BETA),
    *bad(TypeError, WEIGHTS, [True, False], "got {value}...bool tensor...size_average...reduction"),
    *bad(TypeError, WEIGHTS, ["sum", "mask"], "got '{value}': reduction goes by name"),
    *bad(ValueError, "normalizer", [1, 2.0, TENSORS[0]], "sum...none...", reduction="none"),
    *bad(ValueError, "normalizer", [1, 2.0, TENSORS[0]], "sum...mean..."),
    *bad(ValueError, "normalizer", [1, 2.0], "sum...batchmean...", reduction="batchmean"),
    *bad(ValueError, "normalizer", [0, -1, -0.5, nan, inf, -inf], "above 0, got {value}...", **SUM),
    *bad(ValueError, "normalizer", [0], "above 0...", input=EMPTY, target=EMPTY, **SUM),
    *bad(ValueError, "normalizer", of((1,), (6, 1), (1, 1), (0,), (6, 4)), "{shape}", **SUM),
    *bad(ValueError, "normalizer", TENSORS[1:], "grad: pass {name}.detach()", **SUM),
    *bad(ValueError, f"{WEIGHTS} normalizer", [10**400], "float...", **SUM),
    *bad(TypeError, "normalizer", ["2", [2.0], 2j, True, np.ones(1)], "{type}", **SUM),
    *bad(TypeError, "normalizer", of((), dtypes=COMPLEX), "{dtype}", **SUM),
    # A bool would be a mask, so the message must not say that a bool came.
    *bad(TypeError, f"{WEIGHTS} normalizer", [np.bool_(True)], "numpy.bool...", **SUM),
    *bad(TypeError, "size_average reduce weight", [True], "..."),
]
ARGUMENTS = ("error", "name", "value", "said", "others")


def given(error: Any, name: str, value: Any, said: str, others: dict[str, Any]) -> dict[str, Any]:
    arguments = {"input": torch.ones(6, 4), "target": torch.zeros(6, 4), **others, name: value}
    return {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def assert_raises(error: Any, name: str, said: str, function: Any, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    value, message = arguments[name], str(caught.value)
    came = {"value": value, "type": type(value).__name__, "dtype": getattr(value, "dtype", "")}
    came |= {"name": name, "shape": size(value), "input": size(arguments.get("input"))}
    parts = f"...{name}...{said.format(**came)}".split("...")
    assert re.fullmatch(".*".join(map(re.escape, parts)), message), (message, parts)
    return message


@pytest.mark.parametrize(ARGUMENTS, BAD_OPTIONS + BAD_CALLS)
def test_bad_calls(error: Any, name: str, value: Any, said: str, others: Any) -> None:
    """What the message says to pass in its place is not bad any more."""
    arguments = given(error, name, value, said, others)
    message = assert_raises(error, name, said, smooth_l1_loss, **arguments)
    _, _, way_out = message.partition(": pass ")
    if way_out:
        smooth_l1_loss(**arguments | {name: eval(way_out, {"torch": torch, **arguments})})


@pytest.mark.parametrize(ARGUMENTS, BAD_OPTIONS)
def test_bad_options(error: Any, name: str, value: Any, said: str, others: Any) -> None:
    """The module refuses them when it is made."""
    assert_raises(error, name, said, SmoothL1Loss, **others, **{name: value})


@support.on_kernel
def test_nothing_is_launched_for_bad_input(launches: list[str]) -> None:
    for case in BAD_OPTIONS + BAD_CALLS:
        with pytest.raises(case.values[0]):
            smooth_l1_loss(**given(*case.values))
    assert launches == []


@pytest.mark.parametrize("place", ["meta", pytest.param("cpu", marks=support.needs_gpu)])
@pytest.mark.parametrize("name", f"target {TAKE_NUMBERS}".split())
def test_devices_that_differ(name: str, place: str) -> None:
    """Both are named; "meta" stands for a second GPU."""
    arguments = dict(zip(INPUTS.split(), boxes(6), strict=True)) | SUM
    arguments[name] = torch.ones(() if name == "normalizer" else (6, 4), device=place)
    assert_raises(ValueError, name, f"{place}...{DEVICE}...", smooth_l1_loss, **arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("value", [0.5, 3, True, "sum", *of((6,), (1, 6, 4))], ids=str)
def test_messages_of_compiled_functions(value: Any, dynamic: bool) -> None:
    """With a graph for all of it, the message is in the compiler's; otherwise it is the same."""
    name = "target" if size(value) == (1, 6, 4) else "inside_weights"
    arguments = {"input": torch.ones(6, 4), "target": torch.zeros(6, 4), name: value}
    with pytest.raises((TypeError, ValueError)) as plain:
        smooth_l1_loss(**arguments)
    way_out = str(plain.value).rpartition(": ")[2].removesuffix(str(value))
    for fullgraph in (True, False):
        torch._dynamo.reset()
        options: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph}
        compiled = torch.compile(lambda **kw: smooth_l1_loss(**kw), backend="eager", **options)
        # (PyTorch 2.9 does not tell of every exception, 2.10 and 2.11 tell of one in pieces.)
        told = not fullgraph or torch.__version__ >= "2.10"
        said = f"{name}.* must .*: {re.escape(way_out)}" if told else None
        with pytest.raises(Exception, match=said) as caught:
            compiled(**arguments)
        if not fullgraph:
            assert (type(caught.value), f"{caught.value}") == (type(plain.value), f"{plain.value}")
