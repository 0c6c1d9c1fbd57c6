"""Generation: token ids in, token ids out; `text` is the only file here that knows strings."""
