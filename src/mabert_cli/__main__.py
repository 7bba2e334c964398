"""`torchrun --nproc-per-node 2 -m mabert_cli pretrain …`."""

from mabert_cli.app import main

main()
