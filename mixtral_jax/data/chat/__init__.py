"""Conversations: from rows of every chat format to messages, token ids and a loss mask."""
