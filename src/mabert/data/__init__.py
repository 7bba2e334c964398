"""From text on disk to what a model trains on: corpora, tokenizer, shards, rows, masked samples, labelled tables."""
