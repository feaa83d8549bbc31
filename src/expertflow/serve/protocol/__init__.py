"""What clients send: fields, messages and tools, read and checked; and the errors that they get."""
