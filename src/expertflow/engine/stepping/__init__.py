"""What the engine's steps need beside scheduler and executor: requests, steps begun ahead, routes, a fair lock, threads."""
