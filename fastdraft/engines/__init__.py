"""Real serving engines: run beside fastdraft in a Python of their own, and compared with what fastdraft decodes."""
