"""Conversations with a trained model: on the terminal, and as a server for many."""
