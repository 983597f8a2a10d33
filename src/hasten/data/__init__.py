"""From text files to batches: corpus, tokenizer, prepared shards, rows."""
