"""Pure functions on tensors: the scans of Mamba-1 and Mamba-2, the depthwise convolution, the layout of a batch."""

from mabert.ops.backend import use_backend
from mabert.ops.depthwise_conv import depthwise_conv
from mabert.ops.packing import SequenceLayout
from mabert.ops.selective_scan import selective_scan
from mabert.ops.ssd import ssd

__all__ = ["SequenceLayout", "depthwise_conv", "selective_scan", "ssd", "use_backend"]
