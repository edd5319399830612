"""Views of one step, taken of all steps at once."""

from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, value

#: operations that give the data of their first argument another shape, without a copy
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.alias.default,
}


def over_time(node: fx.Node, source: Tensor, *, copies: bool = False) -> Tensor:
    """A view of one step, taken of all: ``source`` is ``(T, *shape)``.

    Args:
        node: the operation.
        source: what it is applied to.
        copies: whether a copy will do where memory cannot be viewed so.

    Raises:
        RuntimeError: memory that cannot be viewed so.
    """
    args, kind = node.args[1:], node.target
    length, shape = source.shape[0], value(node).shape
    rank = source.ndim - 1

    def dim(i: int) -> int:
        return (args[i] if len(args) > i else 0) % max(rank, 1) + 1

    if kind in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return (source.reshape if copies else source.view)(length, *shape)
    if kind is aten.expand.default:
        ones = [1] * (len(shape) - rank)
        return source.reshape(length, *ones, *source.shape[1:]).expand(length, *shape)
    if kind is aten.t.default:
        return source.transpose(1, 2) if rank == 2 else source
    if kind is aten.permute.default:
        return source.permute(0, *(d % rank + 1 for d in args[0]))
    if kind is aten.transpose.int:
        return source.transpose(dim(0), dim(1))
    if kind is aten.unsqueeze.default:
        return source.unsqueeze(args[0] % (rank + 1) + 1)
    if kind is aten.squeeze.dim:
        return source.squeeze(dim(0))
    if kind is aten.select.int:
        return source.select(dim(0), args[1])
    if kind is aten.slice.Tensor:
        start, stop, step = (*args[1:], *(None,) * 3)[:3]
        index = [slice(None)] * dim(0) + [slice(start, stop, step)]
        return source[tuple(index)]
    return source
