"""Conversations: rows of every chat format -> messages -> token ids and a loss mask."""
