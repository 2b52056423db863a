"""How an answer is called: each probe turns a function or class and the inputs of a case into named tensors.

Most questions need only `direct`. A probe for a question that takes a network builds a small one from the case's
matrices, and gives gradients as outputs too, because many mistakes show nowhere else.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Input = Tensor | float | int | bool | str
Outputs = dict[str, Tensor]


def direct(answer: Callable, returns: Sequence[str], /, **inputs: Input) -> Outputs:
    """Call the answer and name what it returns. Raises TypeError where that is not as many tensors as `returns`."""
    results = answer(**inputs)
    results = results if isinstance(results, tuple) and len(returns) > 1 else (results,)
    if len(results) != len(returns):
        raise TypeError(f"{len(returns)} results are expected ({', '.join(returns)}), {len(results)} came.")
    for name, value in zip(returns, results, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}: is there a return?")
    return dict(zip(returns, results, strict=True))


def with_gradients(answer: Callable, returns: Sequence[str], /, **inputs: Input) -> Outputs:
    """As `direct`, and the gradient of the sum of all results in each floating-point input."""
    learnt = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    for value in learnt.values():
        value.requires_grad_()
    outputs = direct(answer, returns, **inputs)
    total = sum(value.sum() for value in outputs.values() if value.is_floating_point())
    return {name: value.detach() for name, value in outputs.items()} | gradients(total, learnt)


def gradients(total: Tensor, learnt: dict[str, Tensor]) -> Outputs:
    """The gradient of `total` in each tensor, 0 where there is none, under the names "gradient in ..."."""
    found = [None] * len(learnt)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(learnt.values()), allow_unused=True)
    pairs = zip(learnt.items(), found, strict=True)
    return {f"gradient in {name}": torch.zeros_like(v) if g is None else g for (name, v), g in pairs}


class TwoMatrices(nn.Module):
    """The smallest VAE: encoder x (B, D) to (B, 2 d) and decoder z (B, d) to (B, D), each one matrix."""

    def __init__(self, encoder: Tensor, decoder: Tensor):
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(m.shape[1], m.shape[0], bias=False) for m in (encoder, decoder))
        self.encoder.weight, self.decoder.weight = nn.Parameter(encoder.clone()), nn.Parameter(decoder.clone())


def two_matrices(
    answer: Callable, returns: Sequence[str], /, encoder: Tensor, decoder: Tensor, **inputs: Input
) -> Outputs:
    """Call `answer(model, **inputs)` for a VAE of two matrices: its results, and their gradient in both matrices."""
    model = TwoMatrices(encoder, decoder)
    outputs = direct(answer, returns, model=model, **inputs)
    learnt = {"encoder": model.encoder.weight, "decoder": model.decoder.weight}
    return outputs | gradients(sum(value.sum() for value in outputs.values()), learnt)


class Reader(nn.Module):
    """The smallest model of masked tokens: ids (B, n) in [0, K], where K is the mask, to logits (B, n, K)."""

    def __init__(self, vectors: Tensor, out: Tensor):
        super().__init__()
        self.vectors, self.out = nn.Parameter(vectors.clone()), nn.Parameter(out.clone())

    def forward(self, ids: Tensor) -> Tensor:
        h = self.vectors[ids]
        return (h + 3 * h.mean(1, keepdim=True)).tanh() @ self.out.T


def reader(answer: Callable, returns: Sequence[str], /, vectors: Tensor, out: Tensor, **inputs: Input) -> Outputs:
    """Call `answer(model, **inputs)` for a Reader: its results, and their gradient in the model's two matrices."""
    model = Reader(vectors, out)
    outputs = direct(answer, returns, model=model, **inputs)
    learnt = {"vectors": model.vectors, "out": model.out}
    return outputs | gradients(sum(value.sum() for value in outputs.values()), learnt)


def linear_flow(answer: Callable, returns: Sequence[str], /, matrix: Tensor, drift: Tensor, **inputs: Input) -> Outputs:
    """Call `answer(predict, **inputs)` where predict(x, i) is linear in x (B, D) and differs from step to step."""
    return direct(answer, returns, predict=lambda x, i: x @ matrix + (int(i) + 1) * drift, **inputs)


class Denoiser(nn.Module):
    """The smallest conditional model: x (B, D), t (B,) and c (B, n) to (B, D), one matrix and a tanh."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x, t[:, None], c], dim=1).tanh() @ self.matrix


def denoiser(answer: Callable, returns: Sequence[str], /, matrix: Tensor, **inputs: Input) -> Outputs:
    """Call `answer(model, **inputs)` for a Denoiser: its results, and their gradient in the model's matrix."""
    model = Denoiser(matrix)
    outputs = direct(answer, returns, model=model, **inputs)
    return outputs | gradients(sum(value.sum() for value in outputs.values()), {"matrix": model.matrix})


PROBES: dict[str, Callable[..., Outputs]] = {
    probe.__name__: probe for probe in (direct, with_gradients, two_matrices, reader, linear_flow, denoiser)
}
