"""Several sequences in one row, and padding on either side: the numbers are those of each sequence alone.

python examples/packed_sequences.py
"""

import torch

from mabert import MaBertConfig, MaBertModel

torch.manual_seed(0)
model = MaBertModel(MaBertConfig.tiny(vocab_size=1000)).eval()
first, second = torch.randint(5, 1000, (1, 7)), torch.randint(5, 1000, (1, 4))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return (a - b).abs().max().item()


with torch.no_grad():
    alone_first, alone_second = model(first).last_hidden_state, model(second).last_hidden_state

    # One row, no pads: seq_idx says which sequence a token belongs to.
    row = torch.cat([first, second], dim=1)
    seq_idx = torch.tensor([[0] * 7 + [1] * 4])
    packed = model(row, seq_idx=seq_idx).last_hidden_state
    print(f"packed, first sequence   {largest_difference(packed[:, :7], alone_first):.1e}")
    print(f"packed, second sequence  {largest_difference(packed[:, 7:], alone_second):.1e}")

    # The usual batch with pads; here they stand on the left, where an unprotected scan would meet them first.
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), second], dim=1)
    mask = (padded != 0).long()
    output = model(
        torch.cat([first, padded]), attention_mask=torch.cat([torch.ones_like(first), mask])
    ).last_hidden_state
    print(f"padded on the left       {largest_difference(output[1:, 3:], alone_second):.1e}")
