"""Requests: fields, messages, tools, forms; and errors."""
