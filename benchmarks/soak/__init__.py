"""Whether a long training holds what it held at its beginning: memory, descriptors, threads, shared memory."""
