"""Conversations to align a model with, made by rules: reasoning, instructions, tools. All of it is true and can be verified."""
