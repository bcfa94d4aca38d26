"""How hard each sample of a batch pulls at the weights, from one backward pass of the whole batch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Pulls"]


class Pulls:
    """Watches the layers during one forward pass, and says afterwards what each sample's gradient can be at most.

    Of every layer with weights of its own: the norm of a sample's input times the norm of the loss's gradient by its output, squared and added up over the layers, and the root of
    it. For a linear layer with one position to a sample this is the norm of the sample's own gradient (Goodfellow 2015, arXiv:1510.01799; without the bias), for layers with
    shared weights (positions of a sequence, and up to the root of the kernel's size convolutions) an upper bound. It is to be compared between samples of one module, and costs one
    backward pass where the norms themselves cost one for each sample. No sample may see another: for eval mode.

    Args:
        size: Samples in the batch. What a layer takes or gives with no multiple of it in its first dimension is left out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Watch the forward passes in here."""
        layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        handles = [layer.register_forward_hook(self._note) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, loss: Tensor) -> npt.NDArray[np.float64] | None:
        """The pull of each sample at the sum of their losses, shape `(size,)`, taken for `size` times the loss, a mean; `None` where no layer was seen.

        Takes gradients by the layers' outputs only: no `.grad` is touched. Blocks.
        """
        if not self._seen or not loss.requires_grad:
            return None
        gradients = torch.autograd.grad(loss, [output for _, output in self._seen], allow_unused=True)
        squares = torch.zeros(self._size, dtype=torch.float64)
        for (inputs, _), gradient in zip(self._seen, gradients, strict=True):
            if gradient is not None:
                squares += (inputs * self._squares(gradient)).cpu()
        return np.asarray(squares.sqrt().numpy(), dtype=np.float64) * self._size

    def _note(self, _: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        given, made = self._first(inputs), self._first(output)
        if given is not None and made is not None and made.requires_grad:
            whole = given.is_floating_point() or given.is_complex()
            squares = self._squares(given.detach()) if whole else torch.ones(self._size, device=given.device)
            self._seen.append((squares, made))

    def _first(self, values: object) -> Tensor | None:
        leaves = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
        return next((leaf for leaf in leaves if leaf.dim() and leaf.shape[0] and leaf.shape[0] % self._size == 0), None)

    def _squares(self, tensor: Tensor) -> Tensor:
        flat: Tensor = tensor.reshape(self._size, -1).double().square().sum(dim=1)
        return flat
