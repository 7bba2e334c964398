"""Pure functions on tensors: the selective scan, the depthwise convolution, and the layout of sequences in a batch."""

from mabert.ops.backend import use_backend
from mabert.ops.depthwise_conv import depthwise_conv
from mabert.ops.packing import SequenceLayout
from mabert.ops.selective_scan import selective_scan

__all__ = ["SequenceLayout", "depthwise_conv", "selective_scan", "use_backend"]
