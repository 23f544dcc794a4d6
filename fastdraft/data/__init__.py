"""Conversations to tokens with a loss mask, to packs, to batches; and the vocabulary map, from tokens alone."""
