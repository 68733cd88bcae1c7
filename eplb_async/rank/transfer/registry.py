"""Which way of moving weights fits the weights at hand."""

from collections.abc import Sequence

from eplb_async.core.errors import SpecError
from eplb_async.rank.streams import HostStream
from eplb_async.rank.transfer.base import Transfer
from eplb_async.rank.weights import LayerTensors, WeightRows

__all__ = ["open_transfer"]


def open_transfer(weights: Sequence[LayerTensors], rows: WeightRows, num_staging_rows: int, name: str) -> Transfer:
    """The transfer backend for these weights, with its stream and staging rows.

    Args:
        weights: as given to attach.
        rows: their checked views.
        num_staging_rows: rows to receive into.
        name: for the stream's thread.

    Raises:
        SpecError: no backend can reach such weights from another process.
    """
    from eplb_async.rank.transfer.shm import SharedWeights, ShmTransfer

    if isinstance(weights, SharedWeights):
        return ShmTransfer(rows, num_staging_rows, HostStream(name), weights)
    device = rows.rows[0][0].device
    if device.type == "cpu":
        raise SpecError(
            "other ranks cannot reach these CPU weights: make them with "
            "weights = share_weights(group, rank, weights_per_layer) (eplb_async.rank.transfer.shm), compute with the "
            "tensors in it, and pass it to attach"
        )
    raise SpecError(
        f"weights on {device} cannot be moved by this version; it moves weights in shared memory on the CPU"
    )
