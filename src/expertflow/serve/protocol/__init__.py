"""What clients send and get: fields, errors, prompts and answers, in the shapes of the APIs that they were written for."""
