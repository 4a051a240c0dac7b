"""`python -m bench.sanitize`: a small run on CUDA, to be put under compute-sanitizer.

Each answer is compared with the tests' oracle as well, so the run says something without the tool.
"""

import sys

import torch

from bench.calls import SIGMA, Call, calls
from tests.oracle import smooth_l1

ROWS = (1, 33, 1031)  # less than one block, less than one with a tail, several with a tail
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main() -> int:
    """Run every call; return 1 if an answer is wrong or there is no GPU."""
    if not torch.cuda.is_available():
        print("bench.sanitize: PyTorch sees no CUDA device here; nothing was run")
        return 1
    device = torch.device("cuda")
    wrong = [
        f"{call.name}, {rows} rows"
        for rows in ROWS
        for call in calls(rows, device)
        if not _is_right(call)
    ]
    torch.cuda.synchronize()
    print(f"bench.sanitize: {len(wrong)} wrong answers", *wrong, sep="\n  ")
    return int(bool(wrong))


def _is_right(call: Call) -> bool:
    loss, gradient, *_ = call()
    truth = smooth_l1(
        call.input,
        call.target,
        call.inside_weights,
        call.outside_weights,
        beta=SIGMA**-2,
        **{"reduction": "mean", **call.options},
        upstream=call.upstream,
    )
    relative = TOLERANCE[call.input.dtype]
    return all(
        torch.allclose(
            torch.as_tensor(ours.double().cpu()),
            torch.as_tensor(theirs),
            rtol=relative,
            atol=relative * float(abs(theirs).max()),
        )
        for ours, theirs in ((loss, truth.loss), (gradient, truth.input))
    )


if __name__ == "__main__":
    sys.exit(main())
